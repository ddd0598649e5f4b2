"""Clients that talk without a pause, and what becomes of their connections."""

import asyncio
from contextlib import asynccontextmanager
from typing import NamedTuple


class Speed(NamedTuple):
    """What can be asked of a machine."""

    rounds: int = 30  # of each client, between two steps
    pause_seconds: float = 0.01  # of each client, between two connections
    answer_seconds: float = 3.0
    most_seconds: float = 90.0  # for a step


SPEEDS = {"fast": Speed(), "slow": Speed(2, 1.0, 30.0, 300.0)}


class Traffic:
    """Clients that make a connection after another, and one each that stays for ever."""

    def __init__(self, lab, clients, speed):
        self._lab = lab
        self._speed = speed
        self._clients = clients
        self.made = dict.fromkeys(clients, 0)
        self.kept = {}  # by kind and client
        self.failures = []
        self.lost = []
        self._running = {}

    @asynccontextmanager
    async def flowing(self):
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self.begin()
            yield
            self.stop()

    def begin(self):
        self._running["new"] = [self._tasks.create_task(self._new(name)) for name in self._clients]
        self.begin_long()

    def begin_long(self, kind="long"):
        """Have each client make a connection that stays until its kind is stopped."""
        self.kept |= {(kind, name): 0 for name in self._clients}
        talks = [self._long(kind, name) for name in self._clients]
        self._running[kind] = [self._tasks.create_task(talk) for talk in talks]

    def stop(self, *kinds):
        for kind in kinds or list(self._running):
            for task in self._running.pop(kind):
                task.cancel()
            self.kept = {k: count for k, count in self.kept.items() if k[0] != kind}

    def renew_long(self):
        """End the long connections as their clients would, and make new ones."""
        self.stop("long")
        self.begin_long()

    async def more(self):
        """Wait until everybody has got through some more, or has failed."""
        aims = {name: count + self._speed.rounds for name, count in self.made.items()}
        kept = {key: count + self._speed.rounds for key, count in self.kept.items()}
        async with asyncio.timeout(self._speed.most_seconds):
            while not self.failures and not self.lost:
                made = all(self.made[name] >= aims[name] for name in aims)
                if made and all(self.kept[key] >= kept[key] for key in kept):
                    return
                await asyncio.sleep(0.05)

    async def _new(self, name):
        namespace, ip, port = self._clients[name]
        while True:
            try:
                async with asyncio.timeout(self._speed.answer_seconds):
                    opened = await self._connected(namespace, ip, port)
                    await said(opened)
                    opened.close()
            except OSError as error:  # which a TimeoutError is
                self.failures.append(f"{name}: {error!r}")
            self.made[name] += 1
            await asyncio.sleep(self._speed.pause_seconds)

    async def _long(self, kind, name):
        opened, key = None, (kind, name)
        try:
            opened = await self._connected(*self._clients[name])
            while True:
                async with asyncio.timeout(3 * self._speed.answer_seconds):
                    await said(opened)
                self.kept[key] += 1
                await asyncio.sleep(self._speed.pause_seconds)
        except OSError as error:
            self.lost.append(f"{name}, {kind}: {error!r}")
        finally:
            if opened is not None:
                opened.close()

    async def _connected(self, namespace, ip, port):
        opened = self._lab.socket(namespace, ip)
        await asyncio.get_running_loop().sock_connect(opened, (ip, port))
        return opened


async def said(opened):
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(opened, b"hello\n")
    if not await loop.sock_recv(opened, 100):
        raise ConnectionResetError("the other side has gone")

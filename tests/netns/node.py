"""A proxied node in this namespace: one family of a real mode, and what tests say of it."""

import asyncio
import socket
from contextlib import asynccontextmanager

from msgspec import structs

from pyproxy import proxier
from pyproxy.cache import Cache
from pyproxy.config import Config
from pyproxy.host import Host
from pyproxy.lane import Lane
from pyproxy.model import (
    Endpoint,
    EndpointSlice,
    ObjectName,
    PortKey,
    Remove,
    Service,
    SpecPort,
    Upsert,
)
from pyproxy.plan import Site
from pyproxy.process import SystemClock
from pyproxy.runner import Pace
from pyproxy.topology import Place

STRANGER = {4: "198.51.100.50", 6: "fd00:5e::50"}
POD = {4: "10.244.1.10", 6: "fd00:10:244::10"}
NODE_IP = {4: "192.0.2.11", 6: "fd00:c0de::11"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
VIP = {4: "10.96.0.{}", 6: "fd00:10:96::{}"}
CAPTURE = "auto"
WORKERS = 1
SILENCE = 0.3  # seconds without an answer


class PretendHost(Host):
    """Takes the addresses of the stranger and of the pod for those of other machines."""

    async def read(self):
        await super().read()
        others = {*STRANGER.values(), *POD.values()}
        self.snapshot = structs.replace(
            self.snapshot,
            addresses=frozenset(
                (name, text)
                for name, text in self.snapshot.addresses
                if text.split("/")[0] not in others
            ),
        )


class Observer:
    def __init__(self):
        self.reports = []
        self.results = []
        self._news = asyncio.Event()

    def requested(self, family):
        pass

    def synced(self, report):
        self.reports.append(report)
        self._news.set()

    def connection(self, proto, result):
        self.results.append((proto, result))

    async def next(self):
        self._news.clear()
        async with asyncio.timeout(30):
            await self._news.wait()
        return self.reports[-1]


class Node:
    """One family of a node, and what tests say of it in few words."""

    def __init__(self, family, tasks, config, *, mode="userspace", host=None):
        self.family = family
        self.observer = Observer()
        self.drifts = []  # table, count, who
        self.tasks = tasks
        self.host = host or PretendHost()
        clock = SystemClock()
        self.lane = Lane(
            family, Cache(family), Pace(0.0, 5.0, 3600.0), clock, self.observer, lambda: None
        )
        self.mode = proxier.load(mode)
        pods = POD[family] + ("/32" if family == 4 else "/128")
        self.env = proxier.Env(
            family=family,
            config=structs.replace(
                config,
                mode=mode,
                cluster_cidr=config.cluster_cidr or pods,
                userspace=structs.replace(
                    config.userspace,
                    capture=CAPTURE,
                    workers=WORKERS,
                    # Only tests of it say for which sockets: others are about the relay.
                    socket_lb=config.userspace.socket_lb if config.userspace.cgroup else "off",
                    drain_timeout_seconds=0.0,
                ),
            ),
            clock=clock,
            tasks=tasks,
            host=self.host,
            node=None,
            node_ips=(NODE_IP[family],),
            observe=self.observer.connection,
            resync=self.lane.resync,
            drifted=lambda *told: self.drifts.append(told),
        )

    @property
    def frontends(self):
        """Return the target that listens, in mode userspace."""
        return self.carrier._target._listeners

    def vip(self, number=1):
        return VIP[self.family].format(number)

    async def start(self, changes=()):
        """Begin with what has been listed, as a process does; return the first sync's report."""
        for change in changes:
            self.lane.change(change)
        await self.host.read()
        self.carrier = self.mode.build(self.env)
        self.lane.move(Site(Place("here"), NODE_IP[self.family]))
        self.lane.start(self.carrier)
        self.tasks.create_task(self.lane.run())
        return await self.observer.next()

    async def stop(self, *, keep=False):
        await self.carrier.aclose()
        if not keep:
            await self.carrier.clear()

    async def service(self, name, number, *, proto="TCP", port=80, node_port=0, **fields):
        """Create or change a Service with the cluster IP ``vip(number)``."""
        ip = {f"cluster_ip{self.family}": self.vip(number)}
        ports = (SpecPort("", proto, port, node_port),)
        obj = Service(ObjectName("default", name), ports=ports, **ip, **fields)
        return await self.change(Upsert("Service", obj))

    async def remove(self, name):
        return await self.change(Remove("Service", ObjectName("default", name)))

    async def endpoints(self, name, *addresses, proto="TCP", node="here", **conditions):
        found = tuple(
            a if isinstance(a, Endpoint) else Endpoint(a, node=node, **conditions)
            for a in addresses
        )
        slice_name = ObjectName("default", name)
        obj = EndpointSlice(slice_name, slice_name, self.family, {PortKey("", proto): found})
        return await self.change(Upsert("EndpointSlice", obj))

    async def change(self, change):
        if self.lane.change(change):
            return await self.observer.next()
        return None

    async def ask(self, ip, port=80, *, source=None, say=b"?"):
        """Connect, say something, end, and return all that is answered."""
        reader, writer = await self.connect(ip, port, source=source)
        try:
            writer.write(say)
            writer.write_eof()
            async with asyncio.timeout(5):
                return await reader.read()
        finally:
            writer.close()

    async def connect(self, ip, port=80, *, source=None):
        async with asyncio.timeout(SILENCE):
            return await asyncio.open_connection(
                ip, port, local_addr=(source, 0) if source else None
            )

    async def ask_udp(self, ip, port, *, source=None, say=b"?", sock=None, seconds=SILENCE):
        """Send a datagram from a connected socket; return the answer."""
        loop = asyncio.get_running_loop()
        own = sock or udp_client(ip, port, source)
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_sendall(own, say)
                return await loop.sock_recv(own, 2048)
        finally:
            if sock is None:
                own.close()


def udp_client(ip, port, source=None):
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if source:
        sock.bind((source, 0))
    sock.connect((ip, port))
    return sock


class Jobs:
    """A task group whose tasks, which would run for ever, can be ended."""

    def __init__(self, tasks):
        self._tasks = tasks
        self._started = []

    def create_task(self, job, **rest):
        task = self._tasks.create_task(job, **rest)
        self._started.append(task)
        return task

    async def end(self):
        for task in self._started:
            task.cancel()
        await asyncio.gather(*self._started, return_exceptions=True)


@asynccontextmanager
async def proxied(family, config=None, *, changes=(), keep=False, **rest):
    """Run a node; at the end remove what it made, or ``keep`` it as a process that ends does."""
    async with asyncio.TaskGroup() as tasks:
        jobs = Jobs(tasks)
        node = Node(family, jobs, config or Config(), **rest)
        await node.start(changes)
        try:
            yield node
        finally:
            await jobs.end()
            await node.stop(keep=keep)

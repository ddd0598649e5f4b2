"""The demo from beginning to end: a table of requests, then a rolling update under load."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pyproxy.demo.cluster import (
    NODES,
    POD_PORT,
    PODS,
    REPLACEMENTS,
    Pod,
    ServiceAddress,
    of_families,
    service_addresses,
    service_objects,
)
from pyproxy.demo.expect import (
    ORIGINS,
    Case,
    Check,
    Origin,
    Reply,
    Update,
    cases,
    enough,
    explained,
    judged,
    judged_update,
)
from pyproxy.demo.lab import Lab
from pyproxy.demo.manifests import Manifests
from pyproxy.demo.proxy import HEALTHY_SECONDS, ProxyFailed, arguments, healthy, running, tail
from pyproxy.demo.table import Look, Row, closing, paragraph, table, update_lines
from pyproxy.demo.traffic import ask, serve
from pyproxy.model import Address

READY_SECONDS = 10.0
START_SECONDS = 0.2  # how long a new pod takes to become ready
TERMINATING_SECONDS = 1.2  # between a pod's deletion timestamp and the end of its object
GRACE_SECONDS = 1.5  # how long a pod still answers after that
BETWEEN_REQUESTS_SECONDS = 0.01

SCENE = (
    "node-1 with the pods nginx-1, 2 and 3, and one to ask from; node-2 with nginx-4, 5 and 6;"
    " a client outside. pyproxy runs on node-1."
)

Say = Callable[[str], None]


class Outcome(NamedTuple):
    """All that was found out."""

    rows: tuple[Row, ...]
    update: Update
    checks: tuple[Check, ...]


class Servers:
    """The programs in the pods, by pod."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._servers: dict[Pod, list[asyncio.Server]] = {}

    async def start(self, pod: Pod) -> None:
        self._servers[pod] = []
        for ip in of_families(pod.ips, ipv6=self._lab.ipv6):
            opened = self._lab.socket(pod.name, ip)
            opened.bind((ip, POD_PORT))
            opened.listen(128)
            self._servers[pod].append(await serve(pod.name, opened))

    def stop(self, pod: Pod) -> None:
        for server in self._servers.pop(pod):
            server.close()

    def stop_all(self) -> None:
        for pod in list(self._servers):
            self.stop(pod)


class Load:
    """Clients that never stop asking, and what became of it."""

    def __init__(self, lab: Lab) -> None:
        self.requests = 0
        self.failures: list[str] = []
        self._lab = lab
        self._answered: dict[str, asyncio.Event] = {}

    @contextlib.asynccontextmanager
    async def running(self, asked: Mapping[Origin, Address]) -> AsyncIterator[None]:
        """Keep asking, each origin an address, for the length of a block."""
        async with asyncio.TaskGroup() as clients:
            tasks = [
                clients.create_task(self._ask_for_ever(*pair), name=f"load from {pair[0].name}")
                for pair in asked.items()
            ]
            yield
            for task in tasks:
                task.cancel()

    async def answered_by(self, pod: Pod) -> bool:
        """Wait until a request has reached a pod; False where that takes too long."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._event(pod.name).wait()
        except TimeoutError:
            return False
        return True

    async def _ask_for_ever(self, origin: Origin, address: Address) -> None:
        while True:
            reply = await _ask(self._lab, origin, address)
            self.requests += 1
            if reply.result == "ok":
                self._event(reply.pod).set()
            else:
                self.failures.append(reply.result)
            await asyncio.sleep(BETWEEN_REQUESTS_SECONDS)

    def _event(self, pod: str) -> asyncio.Event:
        return self._answered.setdefault(pod, asyncio.Event())


class Demo:
    """One performance: the lab, the manifests and the pods as they are at the moment."""

    def __init__(self, lab: Lab, folder: Path, mode: str, say: Say, look: Look) -> None:
        self._lab = lab
        self._mode = mode
        self._say = say
        self._look = look
        self._services = service_objects(ipv6=lab.ipv6)
        self._addresses = service_addresses(self._services, NODES[0])
        self._manifests = Manifests(folder, self._services, PODS)
        self._servers = Servers(lab)

    @contextlib.asynccontextmanager
    async def on_stage(
        self, log: Path, command: Sequence[str] = (), start_seconds: float = HEALTHY_SECONDS
    ) -> AsyncIterator[None]:
        """Have pods answer and pyproxy run for the length of a block."""
        self._say_all(paragraph(SCENE))
        self._say("")
        started = _now()
        options = arguments(self._manifests.folder, self._mode, ipv6=self._lab.ipv6)
        try:
            for pod in PODS:
                await self._servers.start(pod)
            async with running(self._lab, options, log, command) as process:
                await healthy(self._lab, process, log, start_seconds)
                await self._first_answer(log)
                self._say(
                    f"pyproxy run --proxy-mode {self._mode}: ready after {_now() - started:.1f} s\n"
                )
                yield
        finally:
            self._servers.stop_all()

    async def play(self) -> Outcome:
        """Ask everything from everywhere, replace pods under load, and ask again."""
        rows = await self._asked(self._addresses, PODS)
        for sentence in (*notes(), *explained(self._services, self._addresses)):
            self._say("")
            self._say_all(paragraph(sentence))
        self._say("\nrolling update of node-1's pods, while pod and client keep asking:")
        update = await self._updated()
        self._say_all(update_lines(update, self._look))
        self._say("\nafterwards:")
        first = self._addresses[0].service
        again = [asked for asked in self._addresses if asked.service == first]
        rows += await self._asked(again, tuple(self._manifests.phases))
        checks = (*(row.check for row in rows), *judged_update(update))
        self._say("")
        self._say_all(closing(checks, self._look))
        return Outcome(rows, update, checks)

    async def _first_answer(self, log: Path) -> None:
        """Wait until the first address answers: healthy is not yet ready to forward."""
        node, address = ORIGINS[1], self._addresses[0].address
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    if (await _ask(self._lab, node, address)).result == "ok":
                        return
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise ProxyFailed(f"nobody answers at {address}:{tail(log)}") from error

    async def _asked(
        self, addresses: Iterable[ServiceAddress], pods: Sequence[Pod]
    ) -> tuple[Row, ...]:
        todo = cases(addresses, self._services, pods)
        rows = tuple([await self._row(case) for case in todo])
        self._say_all(table(rows, [pod.name for pod in pods], self._look))
        return rows

    async def _row(self, case: Case) -> Row:
        replies: list[Reply] = []
        while not enough(case, replies):
            replies.append(await _ask(self._lab, case.origin, case.asked.address))
        return Row(case, tuple(replies), judged(case, replies))

    async def _updated(self) -> Update:
        """Replace the pods of the first node, one after another, while clients keep asking."""
        started = _now()
        load = Load(self._lab)
        late: list[str] = []
        pod, _, outside = ORIGINS
        inner, outer = self._addresses[:2]  # of one Service: its cluster IP, its load balancer IP
        async with (
            load.running({pod: inner.address, outside: outer.address}),
            asyncio.TaskGroup() as retirements,
        ):
            for old, new in zip(PODS, REPLACEMENTS, strict=False):
                fate = "is ready and answers"
                if not await self._introduced(new, load):
                    fate = "is ready and gets no requests"
                    late.append(new.name)
                when = f"  {_now() - started:3.1f} s {load.requests:5} requests"
                self._say(f"{when}  {new.name} {fate}, {old.name} terminates")
                retirements.create_task(self._retire(old), name=f"retire {old.name}")
        return Update(load.requests, tuple(load.failures), _now() - started, tuple(late))

    async def _introduced(self, pod: Pod, load: Load) -> bool:
        """Start a pod, and say whether requests reach it once it is ready."""
        self._manifests.put(pod, "starting")
        await self._servers.start(pod)
        await asyncio.sleep(START_SECONDS)
        self._manifests.put(pod, "ready")
        return await load.answered_by(pod)

    async def _retire(self, pod: Pod) -> None:
        """End a pod as the API does: it terminates, its object goes, and then its program."""
        self._manifests.put(pod, "terminating")
        await asyncio.sleep(TERMINATING_SECONDS)
        self._manifests.remove(pod)
        await asyncio.sleep(GRACE_SECONDS)
        self._servers.stop(pod)

    def _say_all(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._say(line)


def notes() -> tuple[str, ...]:
    """Return what a reader of the table may wonder about."""
    local = (
        "my-nginx-local has externalTrafficPolicy: Local. From outside only the pods of node-1"
        " answer, which is the node that was asked; the cluster's own pods and nodes reach all."
    )
    clients = (
        "Pods see the client's own address inside the cluster, and from outside where"
        " externalTrafficPolicy is Local; elsewhere the node's, so that replies pass through it."
    )
    return clients, local


async def _ask(lab: Lab, origin: Origin, address: Address) -> Reply:
    return await ask(lab.socket(origin.namespace, address.ip), address)


def _now() -> float:
    return asyncio.get_running_loop().time()

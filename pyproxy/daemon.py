"""What the running process tells commands: its parts as one view, and what only it can find out."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import starmap
from typing import Any, Final

from pyproxy.config import Config, gate, is_beside
from pyproxy.control import LiveQuestion
from pyproxy.counting import Counting
from pyproxy.doctor.look import open_files
from pyproxy.doctor.setup import Setup
from pyproxy.ip import is_loopback
from pyproxy.lane import Lane
from pyproxy.metrics import Metrics
from pyproxy.model import Family, Kind, ObjectName
from pyproxy.plan import Site
from pyproxy.proxier import Env, load
from pyproxy.proxier._around import node_port_ips, surroundings
from pyproxy.reconcile import ApplyError, Proxier, Verified
from pyproxy.rules.entries import entries
from pyproxy.rules.listeners import Surroundings
from pyproxy.service_metrics import MOST_ROWS, ServiceMetrics
from pyproxy.topology import Place
from pyproxy.traffic import TrafficCounts, asked_rows, wants_endpoints
from pyproxy.view import FamilyView, Query, QueryError, View, asked_service
from pyproxy.written import (
    DifferenceRow,
    Entries,
    EntryRow,
    FamilyEntries,
    Verification,
    VerifiedFamily,
)

ATTEMPTS: Final = 20  # to look between two syncs
PAUSE_SECONDS: Final = 0.05

log = logging.getLogger(__name__)


class Daemon:
    """Answers for the lanes of a process. What is asked changes nothing."""

    def __init__(self, node: str, config: Config, lanes: Sequence[Lane]) -> None:
        self._node = node
        self._config = config
        self._lanes = lanes
        self._carriers: dict[Family, tuple[Env, Proxier]] = {}
        self._counted: dict[Family, Proxier] = {}
        self._counting = Counting(self._counted)
        self._service_metrics: ServiceMetrics | None = None
        self._metrics: Metrics | None = None
        self._as_of: dict[Kind, float] = {}  # of kinds that are known from the state on disk only

    def listed(self, kind: Kind, as_of: float | None) -> None:
        """Take in whether a kind of object is known as it is, or as it was at some time."""
        if as_of is None:
            self._as_of.pop(kind, None)
        else:
            self._as_of[kind] = as_of

    def carries(self, env: Env, carrier: Proxier) -> None:
        """Take in who writes a family's plan, once it is known."""
        self._carriers[env.family] = (env, carrier)
        self._counted[env.family] = carrier

    def publish(self, metrics: Metrics) -> None:
        """Have metrics tell how far each kind of object is written, and what audits found."""
        self._metrics = metrics
        kinds: tuple[Kind, ...] = ("Service", "EndpointSlice")
        for lane in self._lanes:
            for kind in kinds:
                metrics.applied(kind, lane.family, partial(lane.written, kind))
        if self._config.service_metrics != "off":
            self._service_metrics = ServiceMetrics(on_full=tell_of_many)
            metrics.register(self._service_metrics)

    async def count(self) -> None:
        """Bring the metrics of Services up to date, before they are read."""
        if self._service_metrics is not None:
            by_endpoint = self._config.service_metrics == "endpoint"
            await self._counting.publish(self._service_metrics, by_endpoint=by_endpoint)

    def view(self) -> View:
        return View(
            node=self._node,
            mode=self._config.mode,
            families=tuple(self._family(lane) for lane in self._lanes),
            allow_external_ips=gate(self._config, "AllowServiceExternalIPs"),
            cloud=self._config.cloud_annotations,
            keeps_client_address=self._config.userspace.keep_client_address,
            ipvs_scheduler=self._config.ipvs.scheduler,
            as_of=dict(self._as_of),
        )

    def live(self) -> Mapping[str, LiveQuestion]:
        """Return what is asked about more than the state, by its path."""
        return {
            "verify": self._verify,
            "entries": self._entries,
            "audit": self._audit,
            "setup": self._setup,
            "traffic": self._traffic,
        }

    async def _traffic(self, query: Query) -> TrafficCounts:
        """Read what went to each Service port, or to each endpoint."""
        found = await self._counting.traffic(by_endpoint=wants_endpoints(query))
        now = asyncio.get_running_loop().time()
        return TrafficCounts(
            self._config.mode, now, asked_rows(found, query), self._counting.problems
        )

    async def _setup(self, _query: Query) -> Setup:
        envs = [env for env, _carrier in self._carriers.values()]
        node = envs[0].node if envs else None
        return Setup(
            node=self._node,
            mode=self._config.mode,
            kubeconfig=self._config.client_connection.kubeconfig,
            needs_pod_cidrs=self._config.detect_local_mode == "NodeCIDR",
            pod_cidrs=node.pod_cidrs if node is not None else (),
            service_cidrs=envs[0].service_cidrs() if envs else (),
            open_files=open_files(),
            is_beside=is_beside(self._config),
        )

    async def _verify(self, query: Query) -> Verification:
        """Have each family's target compared with what was written: for a Service, or for all."""
        name = asked_service(query)
        if name is not None:
            self.view().service(name)
        found = [await self._verified(lane, name) for lane in self._lanes]
        return Verification(self._config.mode, tuple(found))

    async def _entries(self, _query: Query) -> Entries:
        """Return what is written for each family."""
        found = [await self._written(lane) for lane in self._lanes]
        return Entries(self._config.mode, tuple(found))

    async def _written(self, lane: Lane) -> FamilyEntries:
        for _attempt in range(ATTEMPTS):
            env, carrier = self._carriers.get(lane.family, (None, None))
            items = carrier.written() if carrier is not None else None
            if env is not None and items is not None:
                fixed = load(self._config.mode).fixed(env)
                rows = await asyncio.to_thread(entry_rows, lane.family, items)
                return FamilyEntries(lane.family, (*starmap(EntryRow, fixed), *rows))
            await asyncio.sleep(PAUSE_SECONDS)
        return FamilyEntries(lane.family, None)

    async def _audit(self, query: Query) -> Verification:
        """Have all that was written compared, and put right unless ``repair=false``."""
        repair = query.get("repair", "true")
        if repair not in ("true", "false"):
            raise QueryError(f"repair: {repair} is not true or false")
        found = await self._verify({})
        for lane, family in zip(self._lanes, found.families, strict=True):
            if self._metrics is not None and family.verdict != "unknown":
                self._metrics.audited(lane.family, len(family.differences))
            if repair == "true" and family.differences:
                lane.resync()
        return found

    async def _verified(self, lane: Lane, name: ObjectName | None) -> VerifiedFamily:
        owners = set(lane.plan.ports)
        if name is not None:
            owners = {port.name for port in lane.cache.ports(name)}
        if not owners:
            return VerifiedFamily(lane.family, "agrees", 0)
        if lane.family not in self._carriers:
            return unknown(lane, "nothing has been written yet")
        _env, carrier = self._carriers[lane.family]
        try:
            for _attempt in range(ATTEMPTS):
                if (found := await carrier.verify(owners)) is not None:
                    return compared(lane, found)
                await asyncio.sleep(PAUSE_SECONDS)
        except ApplyError as error:
            return unknown(lane, str(error))
        return unknown(lane, lane.progress.error or "syncs follow each other too fast to look")

    def _family(self, lane: Lane) -> FamilyView:
        known = self._carriers.get(lane.family)
        env = known[0] if known is not None else None
        return FamilyView(
            family=lane.family,
            cache=lane.cache,
            plan=lane.plan,
            site=lane.site or Site(Place(self._node)),
            around=surroundings(env) if env is not None else Surroundings(),
            node_port_ips=answering_ips(env) if env is not None else frozenset(),
            progress=lane.progress,
        )


def tell_of_many(count: int) -> None:
    log.warning(
        "metrics have the busiest Services or endpoints only, and the others as one",
        extra={"count": count, "shown": MOST_ROWS},
    )


def entry_rows(family: Family, items: Mapping[Any, Any]) -> tuple[EntryRow, ...]:
    return tuple(starmap(EntryRow, entries(family, items)))


def compared(lane: Lane, found: Verified) -> VerifiedFamily:
    ordered = sorted(found.differences, key=lambda difference: difference.entry)
    differences = tuple(DifferenceRow(d.entry, d.wanted, d.held) for d in ordered)
    verdict = "differs" if differences else "agrees"
    return VerifiedFamily(lane.family, verdict, found.entries, differences)


def unknown(lane: Lane, why: str) -> VerifiedFamily:
    return VerifiedFamily(lane.family, "unknown", 0, problem=why)


def answering_ips(env: Env) -> frozenset[str]:
    """Return the addresses of this node that serve node ports."""
    chosen = node_port_ips(env, loopback=True)
    own = env.host.snapshot.ips(env.family) if chosen is None else frozenset(chosen)
    on_loopback = env.config.mode in ("userspace", "iptables") and (
        env.config.iptables.localhost_node_ports
    )
    return own if on_loopback else frozenset(ip for ip in own if not is_loopback(ip))

"""Builds the objects, connects them, runs them in one TaskGroup; the only one to know them all."""

import asyncio
import gc
import logging
import signal
from collections.abc import Coroutine, Mapping
from functools import partial
from random import Random

from msgspec import Struct

from pyproxy import proxier
from pyproxy.aftermath import clean_up_after_others
from pyproxy.announcement import keep_announcing, text_of
from pyproxy.cache import Cache
from pyproxy.config import (
    Config,
    NodeIPs,
    detect_node_ips,
    gate,
    local_cidr,
    masquerade_all,
    node_port_cidrs,
    sync_periods,
)
from pyproxy.config.check import family_problems
from pyproxy.config.file import dump
from pyproxy.control import Control
from pyproxy.daemon import Daemon
from pyproxy.doctor.look import at_start
from pyproxy.feed import Feed
from pyproxy.health import Health
from pyproxy.health_ports import HealthPorts
from pyproxy.host import Host, HostError
from pyproxy.http import About, ListenError, health_server, metrics_server
from pyproxy.lane import Lane
from pyproxy.log import set_verbosity
from pyproxy.metrics import Metrics
from pyproxy.model import (
    GATING,
    WILDCARD,
    Change,
    Family,
    ObjectName,
    Remove,
    Replace,
    ServiceCIDR,
    Upsert,
)
from pyproxy.own_node import NodeError, OwnNode
from pyproxy.plan import Site
from pyproxy.reconcile import Clock, Proxier
from pyproxy.runner import Pace
from pyproxy.telemetry import Drifts, Telemetry
from pyproxy.topology import Place

ABOUT_US = "StartKubeProxy"  # the action of an Event about no Service
FULL_SYNC_SECONDS = 3600.0

log = logging.getLogger(__name__)


class Fatal(Exception):
    """The process must end; the text says why, for one line on a terminal."""


class Stopped(Exception):
    """Ends the TaskGroup of everything, as asked."""


class Settings(Struct, frozen=True):
    """What a process is started with."""

    config: Config  # its mode is one there is, not ``auto``
    node_name: str
    families: tuple[Family, ...]
    flags: Mapping[str, str]
    init_only: bool = False
    succeeds_others: bool = False  # after the first sync, remove what others left on the node
    control_socket: str = ""  # where commands are answered; empty: nowhere
    waits_for_node: bool = True  # an API server may yet complete the Node; a manifest will not


class App:
    """One running proxy."""

    def __init__(self, settings: Settings, feed: Feed, metrics: Metrics, clock: Clock) -> None:
        config = settings.config
        sync_seconds, min_seconds = sync_periods(config, config.mode)
        self._settings = settings
        self._feed = feed
        self._metrics = metrics
        self._clock = clock
        self._health = Health(2 * sync_seconds)
        self._telemetry = Telemetry(self._health, metrics, clock.unix)
        self._drifts = Drifts(
            partial(feed.record, "RulesChanged", warning=True, action=ABOUT_US, service=None)
        )
        self._listed = {kind: asyncio.Event() for kind in GATING}
        by_cidr = config.detect_local_mode == "NodeCIDR"
        self._own = OwnNode(settings.node_name, needs_pod_cidrs=by_cidr)
        self._service_cidrs: dict[str, frozenset[str]] = {}
        self._synced = asyncio.Event()
        self._stop = asyncio.Event()
        self._host = Host(with_routes=config.detect_local_mode == "InterfaceNamePrefix")
        pace = Pace(min_seconds, sync_seconds, max(FULL_SYNC_SECONDS, min_seconds))
        self._lanes = [self._lane(family, pace) for family in settings.families]
        self._proxiers: list[Proxier] = []
        self._daemon = Daemon(settings.node_name, config, self._lanes)
        self._daemon.publish(metrics)

    async def run(self, *watchdogs: Coroutine[object, object, None]) -> None:
        """Serve until told to stop, or until a watchdog raises. Raises ``Fatal``."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs = [*self._jobs(tasks), *watchdogs]
                started = [tasks.create_task(job) for job in jobs]
                await self._stop.wait()
                log.info("stopping")
                for task in started:
                    task.cancel()
                await asyncio.gather(*(carrier.aclose() for carrier in self._proxiers))
                raise Stopped
        except* Stopped:
            pass
        except* (Fatal, HostError, ListenError, NodeError) as group:
            raise Fatal(str(first_of(group))) from None
        finally:
            await self._feed.aclose()

    async def settled(self) -> None:
        """Wait until every family is written once."""
        for lane in self._lanes:
            await lane.first_sync.wait()

    def carriers(self) -> tuple[tuple[Lane, Proxier], ...]:
        """Return who writes what, as far as that is known yet."""
        return tuple(zip(self._lanes, self._proxiers, strict=False))

    def troubles(self) -> tuple[str, ...]:
        """Return why the last sync of a family failed, or that there was none."""
        return tuple(lane.progress.error for lane in self._lanes if lane.progress.error is not None)

    def stop(self) -> None:
        """End as on a signal: what is in the kernel stays."""
        self._stop.set()

    def _jobs(self, tasks: asyncio.TaskGroup) -> list[Coroutine[object, object, None]]:
        jobs = [self._feed.follow(self._change), self._host.follow(), self._serve(tasks)]
        return jobs if self._settings.init_only else [*jobs, *self._servers(tasks)]

    def _servers(self, tasks: asyncio.TaskGroup) -> list[Coroutine[object, object, None]]:
        """Return who answers questions, for as long as we run."""
        config, failed = self._settings.config, partial(self._server_failed, tasks)
        hard = config.bind_address_hard_fail
        jobs = []
        if config.healthz_bind_address:
            server = health_server(
                config.healthz_bind_address, self._health, self._metrics, self._clock.unix,
                hard_fail=hard, on_failure=partial(failed, "FailedToStartProxierHealthcheck"),
            )  # fmt: skip
            jobs.append(server.run())
        about = About(
            mode=config.mode,
            config=dump(config),
            flags=self._settings.flags,
            started_at=self._clock.unix(),
            profiling=config.enable_profiling,
            set_verbosity=set_verbosity,
        )
        self._metrics.count_tasks(lambda: len(asyncio.all_tasks()))
        server = metrics_server(
            config.metrics_bind_address, self._metrics, about, self._clock.unix,
            hard_fail=hard, on_failure=partial(failed, "FailedToStartMetricServer"),
            before=self._daemon.count,
        )  # fmt: skip
        jobs.append(server.run())
        if self._settings.control_socket:
            started_at = self._clock.unix()
            control = Control(
                self._settings.control_socket, self._daemon.view, started_at, self._daemon.live()
            )
            jobs.append(control.run())
        return jobs

    async def _serve(self, tasks: asyncio.TaskGroup) -> None:
        """Once all is known that a first sync needs, begin to write, and go on."""
        for kind in GATING:
            await self._listed[kind].wait()
        if self._settings.waits_for_node:
            await self._own.complete()
        await self._host.read_at_last()
        ips = detect_node_ips(self._settings.config, self._own.ips)
        self._check_families(ips)
        for problem in proxier.load(self._settings.config.mode).prepare(self._settings.config):
            log.warning("kernel setting", extra={"problem": problem})
            self._record(tasks, "KernelSettingFailed", problem, warning=True)
        tasks.create_task(self._look_around(), name="look around")
        self._proxiers += [self._carrier(lane, ips, tasks) for lane in self._lanes]
        if self._settings.init_only:
            self._stop.set()
            return
        self._record(tasks, "Starting", "")
        self._own.in_use = True
        self._move()
        for lane, carrier in zip(self._lanes, self._proxiers, strict=True):
            self._telemetry.started(lane.family)
            lane.start(carrier)
        async with asyncio.TaskGroup() as running:
            for lane in self._lanes:
                running.create_task(lane.run(), name=f"sync IPv{lane.family}")
            ports = self._health_ports(tasks, ips)
            running.create_task(ports.keep(self._synced), name="health ports")
            running.create_task(self._settle(), name="settle")
            if period := self._settings.config.programmed_annotation_period_seconds:
                running.create_task(self._announce(period), name="announce")

    async def _announce(self, period: float) -> None:
        await self.settled()
        current = partial(text_of, self._settings.config.mode, self._lanes)
        await keep_announcing(current, self._feed.annotate, period, Random().random)

    async def _look_around(self) -> None:
        """Tell what is wrong with this node, where that is seen at a glance."""
        settings, node = self._settings, self._own.node
        service_cidrs = sorted(set().union(*self._service_cidrs.values()))
        pod_cidrs = node.pod_cidrs if node is not None else ()
        for found in await at_start(settings.config, settings.families, pod_cidrs, service_cidrs):
            log.warning(found.what, extra={"evidence": found.evidence, "fix": found.fix})

    def _check_families(self, ips: NodeIPs) -> None:
        """Compare the settings with the families of this node. Raises ``Fatal``."""
        families = self._settings.families
        if ips.primary not in families:
            raise Fatal(f"this node has no IPv{ips.primary}, the family of its first address")
        pod_cidrs = self._own.node.pod_cidrs if self._own.node else ()
        found = family_problems(
            self._settings.config, ips.primary, pod_cidrs, dual_stack=len(families) == 2
        )
        for warning in found.warnings:
            log.warning(warning)
        if found.errors:
            raise Fatal("; ".join(found.errors))

    def _lane(self, family: Family, pace: Pace) -> Lane:
        config = self._settings.config
        cache = Cache(
            family,
            started_at=self._clock.unix(),
            allow_external_ips=gate(config, "AllowServiceExternalIPs"),
            cloud=config.cloud_annotations,
        )
        return Lane(family, cache, pace, self._clock, self._telemetry, self._synced.set)

    def _carrier(self, lane: Lane, ips: NodeIPs, tasks: asyncio.TaskGroup) -> Proxier:
        known = (ips.ip4, ips.ip6) if ips.primary == 4 else (ips.ip6, ips.ip4)
        env = proxier.Env(
            family=lane.family,
            config=self._settings.config,
            clock=self._clock,
            tasks=tasks,
            host=self._host,
            node=self._own.node,
            node_ips=tuple(ip for ip in known if ip not in ("127.0.0.1", "::1")),
            observe=self._telemetry.connection,
            service_cidrs=lambda: tuple(sorted(set().union(*self._service_cidrs.values()))),
            resync=lane.resync,
            cleaned=partial(self._metrics.conntrack_reconciled, lane.family),
            drifted=partial(self._drifted, tasks, lane.family),
            worker_lost=partial(
                self._metrics.count, "pyproxy_worker_restarts_total", f"IPv{lane.family}"
            ),
            restored=self._metrics.restored,
            counted=self._metrics.count_elsewhere,
            passed=partial(self._metrics.passed, lane.family),
        )
        carrier = proxier.load(self._settings.config.mode).build(env)
        self._daemon.carries(env, carrier)
        return carrier

    # --- what the feed says -------------------------------------------------------------------

    def _change(self, change: Change) -> None:
        self._telemetry.changed(change)
        if change.kind == "Node":
            self._see_node(change)
        elif change.kind == "ServiceCIDR":
            self._see_service_cidrs(change)
        else:
            for lane in self._lanes:
                concerned = lane.change(change)
                self._telemetry.counted(change, lane.family, concerned=concerned)
        if isinstance(change, Replace):
            self._daemon.listed(change.kind, change.as_of)
            if change.kind in self._listed:
                self._listed[change.kind].set()

    def _see_node(self, change: Change) -> None:
        self._own.see(change)
        self._health.node_seen(self._own.node)
        if self._proxiers:
            self._move()

    def _see_service_cidrs(self, change: Change) -> None:
        before = dict(self._service_cidrs)
        match change:
            case Upsert(obj=ServiceCIDR() as cidr):
                self._service_cidrs[cidr.name] = frozenset(cidr.cidrs)
            case Remove(name=name):
                self._service_cidrs.pop(name.name, None)
            case Replace(objects=objects):
                found = [cidr for cidr in objects if isinstance(cidr, ServiceCIDR)]
                self._service_cidrs = {cidr.name: frozenset(cidr.cidrs) for cidr in found}
            case _:
                raise AssertionError("a ServiceCIDR is no other object")
        if self._service_cidrs != before:
            for lane in self._lanes:
                lane.resync()

    def _move(self) -> None:
        """Tell all lanes where the node is."""
        config, node = self._settings.config, self._own.node
        ips = detect_node_ips(config, self._own.ips)
        by_interface = config.detect_local_mode in ("BridgeInterface", "InterfaceNamePrefix")
        for lane in self._lanes:
            site = Site(
                place=Place(self._settings.node_name, self._own.zone),
                node_ip=ips.ip4 if lane.family == 4 else ips.ip6,
                detects_pods=by_interface or local_cidr(config, lane.family, node) is not None,
                masquerade_all=masquerade_all(config, self._settings.config.mode),
            )
            lane.move(site)

    # --- health check node ports, Events ------------------------------------------------------

    async def _settle(self) -> None:
        """When all lanes have written once: the node is served, and what others left can go."""
        for lane in self._lanes:
            await lane.first_sync.wait()
        log.info("serving")
        gc.collect()
        gc.freeze()  # what the first lists left is there to stay: do not walk it again and again
        if self._settings.succeeds_others:
            await clean_up_after_others(self._settings.config, self._clock.monotonic)

    def _health_ports(self, tasks: asyncio.TaskGroup, ips: NodeIPs) -> HealthPorts:
        config, failed = self._settings.config, partial(self._health_port_failed, tasks)
        addresses: dict[Family, list[str]] = {}
        for family in self._settings.families:
            ranges = node_port_cidrs(config, family, (ips.ip4, ips.ip6))
            own = [WILDCARD[family]]
            addresses[family] = (
                own if ranges is None else self._host.snapshot.ips_in(family, ranges)
            )
        return HealthPorts(self._lanes, addresses, self._health, self._clock.unix, failed)

    def _health_port_failed(
        self, tasks: asyncio.TaskGroup, service: ObjectName, error: str
    ) -> None:
        self._record(tasks, "FailedToStartServiceHealthcheck", error, warning=True, service=service)

    def _drifted(
        self, tasks: asyncio.TaskGroup, family: Family, table: str, count: int, who: str
    ) -> None:
        """Tell that somebody else changed our rules, which are put right again."""
        self._telemetry.drifted(family, count, who)
        self._drifts.noted(tasks, table, family, count, who)

    def _server_failed(self, tasks: asyncio.TaskGroup, reason: str, error: str) -> None:
        self._record(tasks, reason, error, warning=True)

    def _record(
        self,
        tasks: asyncio.TaskGroup,
        reason: str,
        message: str,
        *,
        warning: bool = False,
        service: ObjectName | None = None,
    ) -> None:
        action = "Listen" if service is not None else ABOUT_US
        tasks.create_task(
            self._feed.record(reason, message, warning=warning, action=action, service=service),
            name=f"event {reason}",
        )


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first exception in a group, however deep the TaskGroups were nested."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

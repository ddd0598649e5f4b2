"""What a node knows, must do and has written, as commands look at it: of a daemon, or of files."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from msgspec import Struct

from pyproxy.cache import Cache, Owners
from pyproxy.model import Family, Kind, ObjectName, PortPlan, Service, ServicePortName
from pyproxy.plan import Plan, Site
from pyproxy.progress import Progress, State
from pyproxy.rules.listeners import Surroundings

Query = Mapping[str, str]


class QueryError(Exception):
    """A question makes no sense; the text names the part of it that is wrong."""


class NotThereError(Exception):
    """What was asked about does not exist, as far as this node knows."""


class Answer(Struct, frozen=True, rename="camel"):
    """The JSON of a command. Fields are only ever added to it within one version of the API."""


class Complaint(Answer, frozen=True):
    """The answer to what cannot be answered: HTTP status 400 or 404."""

    error: str


class FamilyView(NamedTuple):
    """One IP family. ``progress`` is None where nothing is written: the plan is of files."""

    family: Family
    cache: Cache
    plan: Plan
    site: Site
    around: Surroundings
    node_port_ips: frozenset[str] = frozenset()  # the addresses that serve node ports
    progress: Progress | None = None

    def ports(self, service: ObjectName) -> list[PortPlan]:
        """Return what is planned for the ports of a Service, in their order."""
        owners = (port.name for port in self.cache.ports(service))
        return [self.plan.ports[owner] for owner in owners if owner in self.plan.ports]

    def state(self, owner: ServicePortName) -> State | None:
        return self.progress.state(owner) if self.progress is not None else None

    def refusals(self, owner: ServicePortName) -> tuple[str, ...]:
        """Return what of an owner this node cannot serve, and why."""
        if self.progress is not None:
            return self.progress.refusals(owner)
        return (f"{owner}: {self.plan.failed[owner]}",) if owner in self.plan.failed else ()

    def problems(self, owner: ServicePortName) -> tuple[str, ...]:
        """Return what of an owner is not served, whether others have it or nobody can."""
        return (*self.plan.conflicts.get(owner, ()), *self.refusals(owner))

    def leaving(self) -> Owners:
        """Return the owners that are no more, and whose removal is still to be written."""
        awaited = self.progress.awaited() if self.progress is not None else set()
        return {owner for owner in awaited if self.cache.port(owner) is None}


class View(NamedTuple):
    """All that a command is told; it lives on while it is looked at, so look without waiting."""

    node: str
    mode: str
    families: tuple[FamilyView, ...]
    allow_external_ips: bool = True
    cloud: str = ""  # whose annotations count
    keeps_client_address: bool = True  # mode userspace: where answers come back by this node
    ipvs_scheduler: str = ""  # mode ipvs: of Services that name none
    as_of: Mapping[Kind, float] = MappingProxyType({})  # Unix seconds, of kinds that are stale

    def service(self, name: ObjectName) -> Service:
        """Return a Service. Raises ``NotThereError``."""
        for view in self.families:
            if (service := view.cache.services().get(name)) is not None:
                return service
        raise NotThereError(f"Service {name}: there is none that {self.node} knows of")

    def services(self) -> list[Service]:
        """Return all Services, by name."""
        found = self.families[0].cache.services() if self.families else {}
        return [found[name] for name in sorted(found)]


Question = Callable[[View, Query], Answer]


def asked_service(query: Query) -> ObjectName | None:
    """Read ``service=NAMESPACE/NAME``. Raises ``QueryError``."""
    text = query.get("service", "")
    if not text:
        return None
    namespace, slash, name = text.partition("/")
    if not (slash and namespace and name) or "/" in name:
        raise QueryError(f"service: {text} is not NAMESPACE/NAME")
    return ObjectName(namespace, name)


def asked_services(view: View, query: Query) -> list[Service]:
    """Return the Services that a query is about: the one it names, or those of a namespace."""
    name = asked_service(query)
    if name is not None:
        return [view.service(name)]
    namespace = query.get("namespace", "")
    return [s for s in view.services() if not namespace or s.name.namespace == namespace]

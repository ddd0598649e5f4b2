"""The latest objects of one family, grouped by Service port; knows which ports changed."""

from collections.abc import Iterable, Iterator, Mapping

from pyproxy.model import (
    Address,
    Change,
    Endpoint,
    EndpointSlice,
    Family,
    Kind,
    ObjectName,
    PortKey,
    Remove,
    Replace,
    Service,
    ServicePort,
    ServicePortName,
    Upsert,
)
from pyproxy.services import service_ports

Owners = set[ServicePortName]

VERSION_DIGITS = 20  # of the greatest number of 64 bits; to us, a longer version is only text


class Cache:
    """Services and EndpointSlices of one family.

    A change is judged by what is derived from it: an edited annotation, or a slice of a Service
    that does not exist, concerns no owner. Slices are kept one by one, so that an address may
    move from one to another in either order without a gap.
    """

    def __init__(
        self,
        family: Family,
        *,
        started_at: float = 0.0,
        allow_external_ips: bool = True,
        cloud: str = "",
    ) -> None:
        self._family = family
        self._started_at = started_at
        self._allow_external_ips = allow_external_ips
        self._services: dict[ObjectName, Service] = {}
        self._cloud = cloud
        self._ports: dict[ObjectName, dict[PortKey, ServicePort]] = {}
        self._slices: dict[ObjectName, dict[ObjectName, EndpointSlice]] = {}
        self._service_of_slice: dict[ObjectName, ObjectName] = {}
        self._triggers: dict[ObjectName, list[float]] = {}
        self.versions: dict[Kind, int] = {}  # the newest resourceVersion of each kind

    def apply(self, change: Change) -> Owners:
        """Take in a change; return the owners that have to be planned again."""
        match change:
            case Upsert(obj=Service() as service):
                return self._put_service(service)
            case Upsert(obj=EndpointSlice() as endpoint_slice):
                return self._put_slice(endpoint_slice)
            case Remove(kind="Service", name=name):
                self._services.pop(name, None)
                return self._set_ports(name, {})
            case Remove(kind="EndpointSlice", name=name):
                return self._drop_slice(name)
            case Replace(kind="Service" | "EndpointSlice" as kind, objects=objects):
                names = {obj.name for obj in objects}
                gone = [Remove(kind, name) for name in self._names(kind) if name not in names]
                changes: Iterable[Change] = [*(Upsert(kind, obj) for obj in objects), *gone]
                return set().union(*map(self.apply, changes))
            case _:  # a Node or a ServiceCIDR
                return set()

    def owners(self) -> Iterator[ServicePortName]:
        """Iterate over all Service ports there are."""
        for ports in self._ports.values():
            for port in ports.values():
                yield port.name

    def port(self, owner: ServicePortName) -> ServicePort | None:
        ports = self._ports.get(owner.service_name)
        return ports.get(PortKey(owner.port, owner.proto)) if ports else None

    def endpoints(self, owner: ServicePortName) -> tuple[Endpoint, ...]:
        """Return the endpoints of all slices, one for each address, by their printed address.

        Where slices disagree on an address, one that is not terminating wins (kube-proxy: a pod
        may leave one slice and join another while both name it); after that, the better one, and
        the slice with the first name, so that the order of events decides nothing.
        """
        slices = self._slices.get(owner.service_name)
        if not slices:
            return ()
        key = PortKey(owner.port, owner.proto)
        if len(slices) == 1:
            (only,) = slices.values()
            listed: Iterable[Endpoint] = only.endpoints.get(key, ())
        else:
            parts = (slices[name] for name in sorted(slices))
            listed = (e for part in parts for e in part.endpoints.get(key, ()))
        merged: dict[Address, Endpoint] = {}
        for endpoint in listed:
            known = merged.get(endpoint.address)
            if known is None or liveliness(endpoint) > liveliness(known):
                merged[endpoint.address] = endpoint
        return tuple(merged[address] for address in sorted(merged, key=str))

    def services(self) -> Mapping[ObjectName, Service]:
        """Return all Services, also those that have no ports in this family."""
        return self._services

    def ports(self, service: ObjectName) -> tuple[ServicePort, ...]:
        return tuple(self._ports.get(service, {}).values())

    def slices(self, service: ObjectName) -> tuple[EndpointSlice, ...]:
        """Return the slices of a Service, by name."""
        found = self._slices.get(service, {})
        return tuple(found[name] for name in sorted(found))

    def take_triggers(self) -> tuple[float, ...]:
        """Return, once, when the endpoint changes since the last call began (Unix seconds)."""
        times = tuple(at for times in self._triggers.values() for at in times)
        self._triggers.clear()
        return times

    def _put_service(self, service: Service) -> Owners:
        self._services[service.name] = service
        self._note_version("Service", service.resource_version)
        ports = service_ports(
            service,
            self._family,
            allow_external_ips=self._allow_external_ips,
            cloud=self._cloud,
        )
        return self._set_ports(
            service.name, {PortKey(port.name.port, port.name.proto): port for port in ports}
        )

    def _set_ports(self, service: ObjectName, ports: dict[PortKey, ServicePort]) -> Owners:
        before = self._ports.get(service, {})
        if ports:
            self._ports[service] = ports
        else:
            self._ports.pop(service, None)
        changed = {key for key in before.keys() | ports.keys() if before.get(key) != ports.get(key)}
        return {(ports.get(key) or before[key]).name for key in changed}

    def _put_slice(self, new: EndpointSlice) -> Owners:
        self._note_version("EndpointSlice", new.resource_version)
        if new.family != self._family:
            return self._drop_slice(new.name)
        owners: Owners = set()
        if self._service_of_slice.get(new.name, new.service) != new.service:
            owners |= self._drop_slice(new.name)
        slices = self._slices.setdefault(new.service, {})
        old = slices.get(new.name)
        slices[new.name] = new
        self._service_of_slice[new.name] = new.service
        if old is None or old.endpoints != new.endpoints:
            self._note_trigger(new)
            owners |= self._users(new.service, old.endpoints if old else {}, new.endpoints)
        return owners

    def _drop_slice(self, name: ObjectName) -> Owners:
        service = self._service_of_slice.pop(name, None)
        if service is None:
            return set()
        old = self._slices[service].pop(name)
        if not self._slices[service]:
            del self._slices[service]
        self._triggers.pop(service, None)
        return self._users(service, old.endpoints, {})

    def _users(
        self,
        service: ObjectName,
        old: Mapping[PortKey, tuple[Endpoint, ...]],
        new: Mapping[PortKey, tuple[Endpoint, ...]],
    ) -> Owners:
        ports = self._ports.get(service)
        if not ports:
            return set()
        changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
        return {ports[key].name for key in changed if key in ports}

    def _note_trigger(self, new: EndpointSlice) -> None:
        if new.triggered_at is not None and new.triggered_at > self._started_at:
            self._triggers.setdefault(new.service, []).append(new.triggered_at)

    def _note_version(self, kind: Kind, version: str) -> None:
        """Kubernetes 1.35 on: versions of one kind are whole numbers, in order (KEP-5504)."""
        is_number = version.isdecimal() and len(version) <= VERSION_DIGITS
        if is_number and (number := int(version)) > self.versions.get(kind, 0):
            self.versions[kind] = number

    def _names(self, kind: Kind) -> tuple[ObjectName, ...]:
        return tuple(self._services if kind == "Service" else self._service_of_slice)


def liveliness(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return not endpoint.terminating, endpoint.ready, endpoint.serving

"""What a set of manifest files means: Services with their numbers, slices, this node.

A file counts as a whole. While something in it is wrong, its last good version stays in force, and
the other files go on; a file that has never been good counts as far as it can be read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from msgspec import Struct

from pyproxy.kube.decode import DecodeError, decode_object
from pyproxy.kube.events import Skipped
from pyproxy.manifests.allocation import (
    NODE_PORTS,
    Band,
    NumberSpace,
    Slot,
    addresses,
    allocate,
)
from pyproxy.manifests.endpoints import (
    PodIndex,
    complete_slice,
    read_pod,
    read_zone,
    slices_of,
)
from pyproxy.manifests.fields import Document, FieldError
from pyproxy.manifests.objects import (
    Documents,
    Fault,
    Homes,
    Place,
    Reading,
    Written,
    WrittenKind,
    read_objects,
)
from pyproxy.manifests.services import FAMILY_NAMES, ServiceDraft, complete, read_service
from pyproxy.model import (
    PROTOS,
    ApiObject,
    EndpointSlice,
    Family,
    Kind,
    Network,
    Node,
    ObjectName,
    Replace,
    Service,
    ServiceCIDR,
)

DEFAULT_SERVICE_CIDR: Final = "kubernetes"  # the name an API server gives to its own
_KINDS: Final[Mapping[type[ApiObject], Kind]] = {
    Service: "Service",
    EndpointSlice: "EndpointSlice",
    Node: "Node",
    ServiceCIDR: "ServiceCIDR",
}

T = TypeVar("T")
Obj = TypeVar("Obj", Service, EndpointSlice, Node, ServiceCIDR)


class Unreadable(NamedTuple):
    """A file without documents: it cannot be opened, or it is neither YAML nor JSON."""

    reason: str


class Settings(Struct, frozen=True):
    """The node's name, and one service range for each family that Services may have.

    ``proxy_name`` is the label of the Services that are ours; empty: of those that have none.
    """

    node_name: str
    service_cidrs: tuple[Network, ...]
    proxy_name: str = ""

    def families(self) -> tuple[Family, ...]:
        return tuple(network.version for network in self.service_cidrs)

    def bands(self) -> Mapping[NumberSpace, Band]:
        node_ports: dict[NumberSpace, Band] = dict.fromkeys(PROTOS, NODE_PORTS)
        return node_ports | {
            FAMILY_NAMES[network.version]: addresses(network) for network in self.service_cidrs
        }


class Memory(Struct, frozen=True):
    """What an earlier resolution decided, and a later one keeps to."""

    held: Mapping[Slot, int] = {}
    homes: Homes = {}


class Resolved(Struct, frozen=True):
    """What files mean. ``notes`` has what was passed over, which is no fault."""

    services: tuple[Service, ...]
    slices: tuple[EndpointSlice, ...]
    node: Node
    service_cidrs: tuple[ServiceCIDR, ...]
    memory: Memory
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    def objects(self) -> Mapping[Kind, tuple[ApiObject, ...]]:
        return {
            "Service": self.services,
            "EndpointSlice": self.slices,
            "Node": (self.node,),
            "ServiceCIDR": self.service_cidrs,
        }


class Step(NamedTuple):
    """What a new state of the files changes. An error is told when it comes and when it goes."""

    changes: tuple[Replace, ...]
    errors: tuple[str, ...]
    mended: tuple[str, ...]
    notes: tuple[str, ...]


class Manifests:
    """Follows the state of the files, and remembers what was good and what was decided."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._good: dict[str, Documents] = {}
        self._memory = Memory()
        self._faults: Sequence[Fault] = ()
        self._notes: set[str] = set()
        self._objects: dict[Kind, tuple[ApiObject, ...]] = {}

    def receive(self, files: Mapping[str, Documents | Unreadable]) -> Step:
        """Take in the present state of all files, changed or not."""
        resolved, faults = self._resolved(files)
        self._memory = resolved.memory
        errors = [str(fault) for fault in faults if fault not in self._faults]
        mended = [str(fault) for fault in self._faults if fault not in faults]
        notes = [note for note in resolved.notes if note not in self._notes]
        self._faults = faults
        self._notes.update(notes)
        return Step(self._changes(resolved), tuple(errors), tuple(mended), tuple(notes))

    def _resolved(
        self, files: Mapping[str, Documents | Unreadable]
    ) -> tuple[Resolved, Sequence[Fault]]:
        """Resolve the files as they are; where they are bad, once more as they were."""
        present: dict[str, Documents] = {}
        faults: list[Fault] = []
        for file, content in files.items():
            if isinstance(content, Unreadable):
                faults.append(Fault(file, content.reason))
                present[file] = self._good.get(file, ())
            else:
                present[file] = content
        resolved = resolve(present, self._memory, self._settings)
        faults += resolved.faults
        bad = {fault.file for fault in faults}
        self._good = {file: docs for file, docs in self._good.items() if file in files}
        if bad & self._good.keys():
            stale = {file: self._good[file] for file in bad & self._good.keys()}
            resolved = resolve(present | stale, self._memory, self._settings)
            # That the last good version fits no more is not told: the file's fault is known.
            faults += [fault for fault in resolved.faults if fault.file not in bad]
        self._good |= {file: docs for file, docs in present.items() if file not in bad}
        return resolved, faults

    def _changes(self, resolved: Resolved) -> tuple[Replace, ...]:
        changed = {
            kind: objects
            for kind, objects in resolved.objects().items()
            if self._objects.get(kind) != objects
        }
        self._objects |= changed
        return tuple(Replace(kind, objects) for kind, objects in changed.items())


def resolve(files: Mapping[str, Documents], memory: Memory, settings: Settings) -> Resolved:
    """Return what the files mean.

    Without memory, neither the names of the files nor the order of documents matters, but for an
    object that is there twice.
    """
    reading = read_objects(files, memory.homes)
    builder = _Builder(reading, settings.proxy_name)
    drafts, services, granted = builder.services(memory.held, settings)
    return Resolved(
        services=services,
        slices=builder.slices(drafts),
        node=builder.node(settings.node_name),
        service_cidrs=builder.service_cidrs(settings.service_cidrs),
        memory=Memory(granted, reading.homes()),
        faults=(*reading.faults, *builder.faults),
        notes=(*reading.notes, *builder.notes),
    )


class _Builder:
    """Makes the objects of one resolution; collects what is wrong with them on the way."""

    def __init__(self, reading: Reading, proxy_name: str) -> None:
        self._objects = reading.objects
        self._proxy_name = proxy_name
        self.faults: list[Fault] = []
        self.notes: list[str] = []

    def services(
        self, held: Mapping[Slot, int], settings: Settings
    ) -> tuple[Sequence[ServiceDraft], tuple[Service, ...], Mapping[Slot, int]]:
        """Return the drafts that got numbers, the Services of them that are ours, and the numbers.

        As from an API server, endpoints are told of whosever their Service is.
        """
        families = settings.families()
        drafts = list(self._read("Service", lambda n, doc: read_service(n, doc, families)))
        wanted = {slot: n for _, draft in drafts for slot, n in draft.slots().items()}
        allocation = allocate(wanted, held, settings.bands())
        granted: list[ServiceDraft] = []
        services: list[Service] = []
        for written, draft in drafts:
            refusal = draft.refusal(allocation)
            if refusal is not None:
                self.faults.append(written.fault(refusal))
                continue
            completed = complete(draft, allocation.granted)
            granted.append(draft)
            service = self._decoded(written.place, Service, completed)
            if service is not None:
                services.append(service)
        return granted, tuple(services), allocation.granted

    def slices(self, drafts: Iterable[ServiceDraft]) -> tuple[EndpointSlice, ...]:
        """Return the slices made of Pods, then those that are written in the files."""
        zones = {written.name.name: zone for written, zone in self._read("Node", read_zone)}
        pods = PodIndex([pod for _, pod in self._read("Pod", read_pod) if pod is not None])
        slices: dict[ObjectName, EndpointSlice] = {}
        for draft in drafts:
            selected = pods.selected(draft.name.namespace, draft.selector)
            for document in slices_of(draft, selected, zones):
                made = decode_object("EndpointSlice", document)
                assert isinstance(made, EndpointSlice), "what we make ourselves is complete"
                slices[made.name] = made
        for written, document in self._read("EndpointSlice", complete_slice):
            if written.name in slices:
                self.faults.append(written.fault("a slice made of Pods has this name"))
                continue
            decoded = self._decoded(written.place, EndpointSlice, document)
            if decoded is not None:
                slices[decoded.name] = decoded
        return tuple(slices.values())

    def node(self, name: str) -> Node:
        """Return the Node of this name; without a manifest, one that has nothing but the name."""
        for written in self._objects["Node"]:
            if written.name.name == name:
                return self._decoded(written.place, Node, written.document) or Node(name)
        return Node(name)

    def service_cidrs(self, ranges: Iterable[Network]) -> tuple[ServiceCIDR, ...]:
        """Return the ServiceCIDRs; that of --service-cidr is one, as it is in a cluster."""
        default = ServiceCIDR(DEFAULT_SERVICE_CIDR, tuple(map(str, ranges)))
        found = {default.name: default} if default.cidrs else {}
        for written in self._objects["ServiceCIDR"]:
            decoded = self._decoded(written.place, ServiceCIDR, written.document)
            if decoded is not None:
                found[decoded.name] = decoded
        return tuple(found.values())

    def _read(
        self, kind: WrittenKind, read: Callable[[ObjectName, Document], T]
    ) -> Iterator[tuple[Written, T]]:
        for written in self._objects[kind]:
            try:
                yield written, read(written.name, written.document)
            except FieldError as error:
                self.faults.append(written.fault(error))

    def _decoded(self, place: Place, expected: type[Obj], document: Document) -> Obj | None:
        try:
            decoded = decode_object(_KINDS[expected], document, self._proxy_name)
        except DecodeError as error:
            self.faults.append(place.fault(error))
            return None
        if isinstance(decoded, Skipped):
            self.notes.append(f"{expected.__name__} {decoded.name} is ignored: {decoded.reason}")
            return None
        assert isinstance(decoded, expected), "decode_object returns what it is asked for"
        return decoded

"""The objects in parsed documents: of which kind, by which name, and where each is written."""

from collections.abc import Iterator, Mapping
from typing import Final, Literal, NamedTuple

from pyproxy.manifests.fields import Document, Field, FieldError
from pyproxy.model import ObjectName

WrittenKind = Literal["Service", "EndpointSlice", "Pod", "Node", "ServiceCIDR"]
Homes = Mapping[tuple[WrittenKind, ObjectName], str]  # the file that each object comes from
Documents = tuple[object, ...]  # of one file, as parsed; None for an empty one

# The group tells Knative's Service, for one, from that of Kubernetes.
_GROUPS: Final[Mapping[WrittenKind, str]] = {
    "Service": "",
    "EndpointSlice": "discovery.k8s.io",
    "Pod": "",
    "Node": "",
    "ServiceCIDR": "networking.k8s.io",
}
_HINTS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job"),
        "; nothing here starts Pods: write them, or an EndpointSlice",
    ),
    "Endpoints": "; write an EndpointSlice",
}


class Fault(NamedTuple):
    """Something wrong in a file."""

    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


class Place(NamedTuple):
    """Where an object is written. Documents are counted from 1, items of a List from 0."""

    file: str
    document: int
    item: int | None = None

    def __str__(self) -> str:
        item = "" if self.item is None else f": items[{self.item}]"
        return f"document {self.document}{item}"

    def fault(self, text: object) -> Fault:
        return Fault(self.file, f"{self}: {text}")


class Written(NamedTuple):
    """An object and where it is written."""

    place: Place
    kind: WrittenKind
    name: ObjectName
    document: Document

    def fault(self, reason: object) -> Fault:
        return self.place.fault(f"{self.kind} {self.name}: {reason}")


class Reading(NamedTuple):
    """What is written in files: each object once, by name, and what is wrong or passed over."""

    objects: Mapping[WrittenKind, tuple[Written, ...]]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    def homes(self) -> Homes:
        return {(w.kind, w.name): w.place.file for group in self.objects.values() for w in group}


def read_objects(files: Mapping[str, Documents], homes: Homes) -> Reading:
    """Sort the objects by kind and name.

    Of two with one name, that of the file which the object has come from so far counts (a copy
    that somebody edits changes nothing yet), and otherwise the first.
    """
    found: dict[tuple[WrittenKind, ObjectName], list[Written]] = {}
    faults: list[Fault] = []
    notes: dict[str, None] = {}
    for place, document in _objects(files):
        try:
            written = _written(place, document)
        except FieldError as error:
            faults.append(place.fault(error))
            continue
        if written is None:
            notes[_note(Field(document))] = None
        else:
            found.setdefault((written.kind, written.name), []).append(written)
    objects: dict[WrittenKind, list[Written]] = {kind: [] for kind in _GROUPS}
    for key in sorted(found):
        first, *others = _home_first(found[key], homes.get(key))
        objects[first.kind].append(first)
        already = f"it is already in {first.place.file}, {first.place}"
        faults += [written.fault(already) for written in others]
    return Reading(
        {kind: tuple(group) for kind, group in objects.items()}, tuple(faults), tuple(notes)
    )


def _home_first(found: list[Written], home: str | None) -> list[Written]:
    return sorted(found, key=lambda written: written.place.file != home)


def _objects(files: Mapping[str, Documents]) -> Iterator[tuple[Place, object]]:
    for file in sorted(files):
        for number, document in enumerate(files[file], start=1):
            if document is not None:
                yield from _expanded(Place(file, number), document)


def _expanded(place: Place, document: object) -> Iterator[tuple[Place, object]]:
    """Iterate over the items of a List; anything else is itself. Lists are not nested."""
    kind = document.get("kind") if isinstance(document, Mapping) else None
    items = document.get("items") if isinstance(document, Mapping) else None
    is_list = isinstance(kind, str) and (kind == "List" or kind.removesuffix("List") in _GROUPS)
    if not is_list or not isinstance(items, list):
        yield place, document
        return
    # The API server leaves the kind out of the items of a ServiceList.
    implied = {} if kind == "List" else {"kind": str(kind).removesuffix("List")}
    for index, item in enumerate(items):
        own = {**implied, **item} if isinstance(item, Mapping) else item
        yield place._replace(item=index), own


def _written(place: Place, document: object) -> Written | None:
    """Return the object, or None if it is of a kind that is of no interest here."""
    fields = Field(document)
    kind, version = fields["kind"].text(), fields["apiVersion"].text()
    if not kind:
        raise fields["kind"].wrong("it is missing")
    known = next((known for known in _GROUPS if known == kind), None)
    group = version.rpartition("/")[0]
    if known is None or (version and group != _GROUPS[known]):
        return None
    try:
        return Written(place, known, _name(known, fields["metadata"]), fields.mapping())
    except FieldError as error:
        raise FieldError(f"{kind} {_subject(fields)}: {error}") from error


def _name(kind: WrittenKind, metadata: Field) -> ObjectName:
    # A Service's name is a label of DNS; the names of the other kinds may have dots.
    name = metadata["name"].label() if kind == "Service" else metadata["name"].subdomain()
    if kind in ("Node", "ServiceCIDR"):
        return ObjectName("", name)
    return ObjectName(metadata["namespace"].label("default"), name)


def _subject(fields: Field) -> str:
    """Return what a bad object calls itself, if it does."""
    metadata = fields["metadata"].value
    name = Field(metadata)["name"] if isinstance(metadata, Mapping) else Field(None)
    return name.word() if name.value else "without a name"


def _note(fields: Field) -> str:
    kind, version = fields["kind"], fields["apiVersion"]
    of = f" of {version.word()}" if version.value else ""
    return f"kind {kind.word()}{of} is ignored{_HINTS.get(kind.text(), '')}"

"""What is known of the cluster, as bytes: for a start at which the API server is away.

A file has one record after another, each with its length before it, so that neither writing nor
reading a large cluster holds anything up. The first says whose state it is, and when it was
written; what comes after the mark of the end are the changes since then, which a crash may have cut
short. Objects are stored as the model has them; another version of the model is another file.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import GenericAlias
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from pyproxy.ip import parse_network
from pyproxy.model import (
    KINDS,
    ApiObject,
    Change,
    Endpoint,
    EndpointSlice,
    Kind,
    Network,
    Node,
    ObjectName,
    Remove,
    Replace,
    Service,
    ServiceCIDR,
    SpecPort,
    Upsert,
    WeightRule,
    object_name,
)

FORMAT: Final = "pyproxy state 2"
BATCH: Final = 200  # objects of a record
LENGTH_BYTES: Final = 4
END: Final = b"\xc0"  # the record after the last object: nil in MessagePack


class StateError(Exception):
    """Bytes that are no state of this version; the text says why."""


class Head(Struct, frozen=True, array_like=True):
    """The first record."""

    format: str
    fields: str  # what the objects of this version are made of
    origin: str  # whose state it is: of which node, by which API server
    saved_at: float  # Unix seconds


class Batch(Struct, frozen=True, array_like=True):
    """Some objects of a kind, and the names of some that are gone."""

    kind: Kind
    objects: msgspec.Raw
    gone: tuple[ObjectName, ...] = ()


# Networks have no form of their own in MessagePack: a Service is stored with their texts instead.
_StoredService: Final[Any] = msgspec.defstruct(
    "_StoredService",
    [
        (f.name, tuple[str, ...] if f.name == "source_ranges" else f.type)
        for f in structs.fields(Service)
    ],
    frozen=True,
    array_like=True,
)  # fmt: skip
_TYPES: Final[Mapping[Kind, Any]] = {
    "Service": _StoredService,
    "EndpointSlice": EndpointSlice,
    "Node": Node,
    "ServiceCIDR": ServiceCIDR,
}
_DECODERS: Final[Mapping[Kind, msgspec.msgpack.Decoder[Any]]] = {
    kind: msgspec.msgpack.Decoder(GenericAlias(list, a_type)) for kind, a_type in _TYPES.items()
}
_FIELDS: Final = "; ".join(
    " ".join(field.name for field in structs.fields(a_type))
    for a_type in (*_TYPES.values(), SpecPort, WeightRule, Endpoint)
)


class LastKnown:
    """The latest objects of every kind."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[ObjectName, ApiObject]] = {kind: {} for kind in KINDS}

    def see(self, change: Change) -> None:
        objects = self._objects[change.kind]
        match change:
            case Upsert(obj=obj):
                objects[object_name(obj)] = obj
            case Remove(name=name):
                objects.pop(name, None)
            case Replace(objects=listed):
                objects.clear()
                objects.update((object_name(obj), obj) for obj in listed)

    def records(self, origin: str, saved_at: float) -> Iterator[bytes]:
        """Yield the bytes of the file, part by part; changes may come in between."""
        yield framed(Head(FORMAT, _FIELDS, origin, saved_at))
        for kind in KINDS:
            objects = list(self._objects[kind].values())
            for first in range(0, len(objects), BATCH):
                yield framed(batch(kind, objects[first : first + BATCH]))
        yield framed_bytes(END)

    def objects(self, kind: Kind) -> tuple[ApiObject, ...]:
        return tuple(self._objects[kind].values())


def batch(kind: Kind, objects: Sequence[ApiObject], gone: tuple[ObjectName, ...] = ()) -> Batch:
    return Batch(kind, msgspec.Raw(msgspec.msgpack.encode([stored(o) for o in objects])), gone)


def appended(change: Upsert | Remove) -> bytes:
    """Return what a file has to be continued with when this has changed since."""
    match change:
        case Upsert(kind=kind, obj=obj):
            return framed(batch(kind, [obj]))
        case Remove(kind=kind, name=name):
            return framed(batch(kind, [], (name,)))


def read_head(data: bytes) -> Head:
    """Return the first record. Raises ``StateError``."""
    try:
        head = msgspec.msgpack.decode(next(unframed(data), b""), type=Head)
    except msgspec.MsgspecError:
        raise StateError("it does not begin as a file of ours") from None
    if (head.format, head.fields) != (FORMAT, _FIELDS):
        raise StateError("another version of pyproxy wrote it")
    return head


def read(data: bytes) -> Iterator[tuple[Upsert | Remove, ...]]:
    """Yield what is after the first record, as changes of nothing. Raises ``StateError``.

    Changes that were appended are read as far as they are whole.
    """
    records = unframed(data)
    next(records, None)
    is_whole = False
    try:
        for record in records:
            if record == END:
                is_whole = True
                continue
            found = msgspec.msgpack.decode(record, type=Batch)
            some = map(restored, _DECODERS[found.kind].decode(found.objects))
            yield (
                *(Upsert(found.kind, obj) for obj in some),
                *(Remove(found.kind, name) for name in found.gone),
            )
    except (msgspec.MsgspecError, StateError) as error:
        if not is_whole:
            raise StateError(f"it is damaged: {error}") from None
    else:
        if not is_whole:
            raise StateError("it is cut off")


def framed(record: Struct) -> bytes:
    return framed_bytes(msgspec.msgpack.encode(record))


def framed_bytes(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def unframed(data: bytes) -> Iterator[bytes]:
    """Yield the records. Raises ``StateError`` where the last one is cut off."""
    view, at = memoryview(data), 0
    while at < len(data):
        end = at + LENGTH_BYTES + int.from_bytes(view[at : at + LENGTH_BYTES], "big")
        if end > len(data):
            raise StateError("it is cut off")
        yield bytes(view[at + LENGTH_BYTES : end])
        at = end


def stored(obj: ApiObject) -> Struct:
    if not isinstance(obj, Service):
        return obj
    fields = structs.asdict(obj)
    fields["source_ranges"] = tuple(map(str, obj.source_ranges))
    service: Struct = _StoredService(**fields)
    return service


def restored(obj: ApiObject) -> ApiObject:
    if not isinstance(obj, _StoredService):
        return obj
    fields = structs.asdict(obj)
    fields["source_ranges"] = tuple(map(network, fields["source_ranges"]))
    return Service(**fields)


def network(text: str) -> Network:
    found = parse_network(text)
    if found is None:
        raise StateError(f"{text} is not a range")
    return found

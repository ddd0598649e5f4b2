"""What the API server sends, line by line and list by list, into events and objects.

An object that breaks the API's form is one error that names the object and the field. It is
passed over and never stops the others.
"""

import re
from collections.abc import Mapping
from sys import intern
from typing import Final

import msgspec

from pyproxy.kube import wire
from pyproxy.kube.annotations import clipped
from pyproxy.kube.events import (
    Bookmark,
    Changed,
    Deleted,
    Event,
    Expired,
    Failed,
    Page,
    Refused,
    Skipped,
    Unreadable,
)
from pyproxy.kube.objects import build, why_not_ours
from pyproxy.model import ApiObject, Kind, ObjectName

_WIRE_TYPES: Final[Mapping[Kind, type[wire.Object]]] = {
    "Service": wire.Service,
    "EndpointSlice": wire.EndpointSlice,
    "Node": wire.Node,
    "ServiceCIDR": wire.ServiceCIDR,
}
_decoders: Final = {kind: msgspec.json.Decoder(shape) for kind, shape in _WIRE_TYPES.items()}
_event_decoder: Final = msgspec.json.Decoder(wire.WatchEvent)
_reference_decoder: Final = msgspec.json.Decoder(wire.Reference)
_bookmark_decoder: Final = msgspec.json.Decoder(wire.Bookmark)
_status_decoder: Final = msgspec.json.Decoder(wire.Status)
_list_decoder: Final = msgspec.json.Decoder(wire.ObjectList)


class DecodeError(Exception):
    """Something is not what the API promises; the text names the object and the field."""


def decode_event(line: bytes, kind: Kind, proxy_name: str = "") -> Event:
    """Return what one line of a watch says. ``proxy_name`` tells whose Services are ours."""
    try:
        event = _event_decoder.decode(line)
        match event.type:
            case "ADDED" | "MODIFIED":
                return _changed(_decoders[kind].decode(event.object), kind, proxy_name)
            case "DELETED":
                metadata = _reference_decoder.decode(event.object).metadata
                return Deleted(metadata.resource_version, _object_name(metadata, kind))
            case "BOOKMARK":
                return _bookmark(_bookmark_decoder.decode(event.object).metadata)
            case "ERROR":
                return _failure(_status_decoder.decode(event.object))
            case unknown:
                return Unreadable("", f"{kind}: a watch event of the unknown type {unknown}")
    except (msgspec.MsgspecError, _NamelessError) as error:
        return _unreadable(line, kind, error)


def decode_list(body: bytes, kind: Kind, proxy_name: str = "") -> Page:
    """Return a list, or a page of one. Its bad objects are among its errors."""
    try:
        listing = _list_decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise DecodeError(f"list of {kind} objects: {error}") from error
    decode = _decoders[kind].decode
    objects: list[ApiObject] = []
    errors: list[str] = []
    for item in listing.items or ():
        try:
            event = _changed(decode(item), kind, proxy_name)
        except (msgspec.MsgspecError, _NamelessError) as error:
            errors.append(_explain(error, kind, msgspec.json.decode(item)))
        else:
            if isinstance(event, Changed):
                objects.append(event.obj)
    metadata = listing.metadata
    return Page(metadata.resource_version, metadata.continue_token, tuple(objects), tuple(errors))


def decode_object(kind: Kind, mapping: object, proxy_name: str = "") -> ApiObject | Skipped:
    """Return the object that parsed YAML or JSON describes, or why it is none of ours."""
    try:
        # Not strict: who writes YAML by hand quotes a number now and then.
        obj = msgspec.convert(mapping, _WIRE_TYPES[kind], strict=False)
        event = _changed(obj, kind, proxy_name)
    except (msgspec.MsgspecError, _NamelessError) as error:
        raise DecodeError(_explain(error, kind, mapping)) from error
    return event.obj if isinstance(event, Changed) else event


def decode_refusal(status: int, body: bytes, retry_after_seconds: float = 0.0) -> Refused:
    """Return an HTTP error; its body is the API's Status, or the text of something in between."""
    try:
        answer = _status_decoder.decode(body)
    except msgspec.MsgspecError:
        text = body[:200].decode(errors="replace").strip().partition("\n")[0]
        return Refused(status, text, "", retry_after_seconds)
    details = answer.details or wire.StatusDetails()
    causes = [cause.reason for cause in details.causes or () if cause.reason]
    wait = max(retry_after_seconds, details.retry_after_seconds or 0.0)
    return Refused(status, answer.message, causes[0] if causes else answer.reason, wait)


class _NamelessError(Exception):
    """An object without a name."""


def _changed(obj: wire.Object, kind: Kind, proxy_name: str) -> Changed | Skipped:
    name = _object_name(obj.metadata, kind)
    version = obj.metadata.resource_version
    reason = why_not_ours(obj, proxy_name)
    return Changed(version, build(name, obj)) if reason is None else Skipped(version, name, reason)


def _object_name(metadata: wire.Metadata, kind: Kind) -> ObjectName:
    if not metadata.name:
        raise _NamelessError("metadata.name: it is missing")
    if kind in ("Node", "ServiceCIDR"):
        return ObjectName("", metadata.name)
    return ObjectName(intern(metadata.namespace or "default"), metadata.name)


def _bookmark(metadata: wire.BookmarkMetadata) -> Bookmark:
    annotations = metadata.annotations
    is_complete = annotations is not None and wire.is_set(annotations.initial_events_end)
    return Bookmark(metadata.resource_version, is_complete)


def _failure(status: wire.Status) -> Expired | Failed:
    if status.code == 410 or status.reason in ("Expired", "Gone"):
        return Expired(status.message)
    return Failed(status.code, status.message)


# --- errors, in words ---------------------------------------------------------------------------

_located = re.compile(r"(.*?) - at `\$\.?(.*)`", re.DOTALL).fullmatch
_missing = re.compile(r"Object missing required field `(.*)`").fullmatch
_expected_type = re.compile(r"Expected `(\w+)[^`]*`(?:, got `.*`)?").fullmatch
_steps = re.compile(r"([^.\[\]]+)").findall

_PORT_FIELDS: Final = frozenset({"port", "nodePort", "healthCheckNodePort"})
_NOUNS: Final = {
    "str": "a string",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}
_UNKNOWN: Final = object()


def _unreadable(line: bytes, kind: Kind, error: Exception) -> Unreadable:
    try:
        event = msgspec.json.decode(line)
    except msgspec.MsgspecError:
        return Unreadable("", f"{kind}: the server sent what is not JSON: {line[:80]!r}")
    obj = _at(event, ["object"])
    version = _at(obj, ["metadata", "resourceVersion"])
    return Unreadable(version if isinstance(version, str) else "", _explain(error, kind, obj))


def _explain(error: Exception, kind: Kind, obj: object) -> str:
    """Say which object is wrong, where, and what is there: one line."""
    words = [_at(obj, ["metadata", part]) for part in ("namespace", "name")]
    name = "/".join(word for word in words if isinstance(word, str) and word)
    subject = f"{kind} {name}" if name else kind
    located = _located(str(error))
    text, path = located.groups() if located else (str(error), "")
    if missing := _missing(text):
        path, text = f"{path}.{missing[1]}".lstrip("."), "it is missing"
    else:
        text = _complaint(text, path, _at(obj, _steps(path)))
    return f"{subject}: {path}: {text}" if path else f"{subject}: {text}"


def _complaint(text: str, path: str, value: object) -> str:
    shown = "it" if value is _UNKNOWN else _shown(value)
    if path.rpartition(".")[2] in _PORT_FIELDS:
        return f"{shown} is not a port"
    if text.startswith("Invalid enum value"):
        return f"{shown} is not TCP, UDP or SCTP"
    expected = _expected_type(text)
    if expected is not None and expected[1] in _NOUNS:
        return f"{shown} is not {_NOUNS[expected[1]]}"
    return text.replace("`", "")


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return clipped(msgspec.json.encode(value).decode())


def _at(value: object, steps: list[str]) -> object:
    """Follow a path of keys and indexes; ``_UNKNOWN`` where it leads nowhere."""
    for step in steps:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _UNKNOWN
    return value

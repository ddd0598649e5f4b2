"""What an API server answers, as values: the input of the watch machine."""

from typing import NamedTuple

from msgspec import Struct

from pyproxy.model import ApiObject, ObjectName


class Changed(Struct, frozen=True):
    """An object is new, or different, or repeated."""

    version: str
    obj: ApiObject


class Deleted(Struct, frozen=True):
    version: str
    name: ObjectName


class Skipped(Struct, frozen=True):
    """An object that is none of ours, or has become so: whoever knows it must forget it."""

    version: str
    name: ObjectName
    reason: str


class Bookmark(Struct, frozen=True):
    """Everything up to ``version`` has been sent; ``is_complete`` ends a streamed list."""

    version: str
    is_complete: bool = False


class Expired(Struct, frozen=True):
    """The server has forgotten where we were."""

    message: str


class Failed(Struct, frozen=True):
    """The server ends the watch with an error."""

    code: int
    message: str


class Unreadable(Struct, frozen=True):
    """A line that could not be decoded. The version may be unknown, and is then empty."""

    version: str
    error: str


class Page(NamedTuple):
    """A list, or a piece of one; a ``continue_token`` that is not empty asks for the next."""

    version: str
    continue_token: str
    objects: tuple[ApiObject, ...]
    errors: tuple[str, ...] = ()


class Absent(Struct, frozen=True):
    """The server does not have this kind of object at all."""


Event = Changed | Deleted | Skipped | Bookmark | Expired | Failed | Unreadable | Page | Absent


# --- how a request ended ------------------------------------------------------------------------


class Closed(Struct, frozen=True):
    """The server ended its answer, or the connection did, or we did not wait any longer."""

    after_seconds: float = 0.0


class Refused(Struct, frozen=True):
    """The server answered with an HTTP error."""

    status: int
    message: str = ""
    reason: str = ""  # the API's word, or the cause's: NotFound, ResourceVersionTooLarge
    retry_after_seconds: float = 0.0


class Unreachable(Struct, frozen=True):
    """There was no answer."""

    message: str


Outcome = Closed | Refused | Unreachable

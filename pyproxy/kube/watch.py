"""What to ask the API server next, and what its answers mean: list, then watch, as a machine.

The list comes as a watch that begins with every object (Kubernetes' streaming lists, KEP-3157)
and ends with a marked bookmark; from a server that cannot do this it comes in pages.
"""

from collections.abc import Callable
from typing import Final

from msgspec import Struct

from pyproxy.kube.events import (
    Absent,
    Bookmark,
    Changed,
    Closed,
    Deleted,
    Event,
    Expired,
    Failed,
    Outcome,
    Page,
    Refused,
    Skipped,
    Unreachable,
    Unreadable,
)
from pyproxy.model import (
    ApiObject,
    Change,
    Kind,
    ObjectName,
    Remove,
    Replace,
    Upsert,
    object_name,
)

PAGE_LIMIT: Final = 500
LONG_ENOUGH_SECONDS: Final = 1.0  # a watch that lasted so long was no failure
SILENT_LIST_SECONDS: Final = 10.0  # a list left open for so long without its end mark has none
ABSENT_SECONDS: Final = 600.0
FIRST_WAIT_SECONDS: Final = 0.2
LONGEST_WAIT_SECONDS: Final = 10.0
LONGEST_ASKED_SECONDS: Final = 60.0  # that a server may send us away for, whatever it says
MAX_CUT_LISTS: Final = 3  # then a streamed list is too much for what lies in between
MAX_FRUITLESS_RESUMES: Final = 3

# Answers that say nothing about the version we resume from.
_RESUMABLE_STATUS: Final = frozenset({401, 403, 404, 408, 429, 500, 502, 503, 504})


class ListPage(Struct, frozen=True):
    """Ask for a list: a page of ``limit`` objects, or all of them (0)."""

    limit: int
    continue_token: str = ""


class Watch(Struct, frozen=True):
    """Ask for changes after ``version``, or for everything and then changes."""

    version: str
    send_initial_events: bool = False


Request = ListPage | Watch


class _Answer(Struct):
    """What there is to know about the current answer."""

    is_useless: bool = False
    is_absent: bool = False
    has_page: bool = False
    has_progress: bool = False


class WatchMachine:
    """Follows all objects of one kind, whatever the server and the network do.

    Law: when the server has been quiet for long enough, the changes that ``receive`` returned
    add up to what the server holds. An unreadable version of an object leaves its last readable
    one in place until the next list.
    """

    def __init__(self, kind: Kind, *, streaming: bool = True, random: Callable[[], float]) -> None:
        """``random`` returns numbers from 0 to 1; nodes must not come back in step."""
        self._kind = kind
        self._streaming = streaming
        self._random = random
        self._version: str | None = None  # None: a list is needed
        self._collected: dict[ObjectName, ApiObject] = {}
        self._continue_token = ""
        self._page_limit = PAGE_LIMIT
        self._answer = _Answer()
        self._silent_ends = 0
        self._cut_lists = 0
        self._fruitless_resumes = 0

    @property
    def kind(self) -> Kind:
        return self._kind

    @property
    def is_useless(self) -> bool:
        """Say whether the rest of the current answer can only be thrown away: stop reading it."""
        return self._answer.is_useless

    def next_request(self) -> Request:
        self._answer = _Answer()
        if self._version is not None:
            return Watch(self._version)
        if not self._continue_token:
            self._collected = {}
        if self._streaming:
            return Watch("", send_initial_events=True)
        return ListPage(self._page_limit, self._continue_token)

    def receive(self, event: Event) -> Change | None:
        """Take in what the server said. What it returns is to be done at once and in order."""
        match event:
            case Changed(version=version, obj=obj):
                return self._changed(version, obj)
            case Deleted(version=version, name=name) | Skipped(version=version, name=name):
                return self._gone(version, name)
            case Bookmark(version=version, is_complete=is_complete):
                return self._bookmark(version, is_complete=is_complete)
            case Page():
                return self._page(event)
            case Absent() | Expired() | Failed() | Unreadable():
                return self._trouble(event)

    def ended(self, outcome: Outcome) -> float:
        """Return how many seconds to wait before the next request."""
        retry_after_seconds = 0.0
        match outcome:
            case Closed(after_seconds=seconds):
                self._closed(seconds)
            case Refused(status=status, reason=reason, retry_after_seconds=retry_after_seconds):
                self._refused(status, reason)
            case Unreachable():
                pass
        if self._fruitless_resumes >= MAX_FRUITLESS_RESUMES:
            self._forget()
        if self._answer.is_absent:
            return self._spread(ABSENT_SECONDS)
        if self._answer.has_page:
            return 0.0
        return max(self._back_off(), min(retry_after_seconds, LONGEST_ASKED_SECONDS))

    # --- events -----------------------------------------------------------------------------

    def _changed(self, version: str, obj: ApiObject) -> Change | None:
        if self._version is None:
            self._collected[object_name(obj)] = obj
            return None
        self._advance(version)
        return Upsert(self._kind, obj)

    def _gone(self, version: str, name: ObjectName) -> Change | None:
        if self._version is None:
            self._collected.pop(name, None)
            return None
        self._advance(version)
        return Remove(self._kind, name)

    def _bookmark(self, version: str, *, is_complete: bool) -> Change | None:
        if self._version is not None:
            self._advance(version)
            return None
        if is_complete:
            return self._listed(version)
        # A server that knows streamed lists sends the marked bookmark first.
        self._streaming = False
        self._answer.is_useless = True
        return None

    def _page(self, page: Page) -> Change | None:
        self._answer.has_page = True
        self._collected.update((object_name(obj), obj) for obj in page.objects)
        self._continue_token = page.continue_token
        return None if page.continue_token else self._listed(page.version)

    def _trouble(self, event: Absent | Expired | Failed | Unreadable) -> Change | None:
        match event:
            case Absent():
                self._forget()
                self._answer.is_absent = True
                return Replace(self._kind, ())
            case Expired():
                self._forget()
            case Failed():
                self._failed()
            case Unreadable(version=version):
                self._advance(version)
        return None

    def _failed(self) -> None:
        self._answer.is_useless = True
        if self._version is None:
            self._cut_list()
        else:
            self._fruitless_resumes += 1

    def _listed(self, version: str) -> Change:
        objects, self._collected = tuple(self._collected.values()), {}
        self._version = version
        self._page_limit = PAGE_LIMIT
        self._cut_lists = self._fruitless_resumes = 0
        return Replace(self._kind, objects)

    def _advance(self, version: str) -> None:
        if self._version is not None:
            self._version = version or self._version
            # A list alone is none: a server may list and then refuse the watch, for ever.
            self._answer.has_progress = True
            self._fruitless_resumes = 0

    def _forget(self) -> None:
        self._version = None
        self._collected = {}
        self._continue_token = ""
        self._fruitless_resumes = 0
        self._answer.is_useless = True

    # --- ends -------------------------------------------------------------------------------

    def _refused(self, status: int, reason: str) -> None:
        if self._version is not None:
            if status not in _RESUMABLE_STATUS or reason == "ResourceVersionTooLarge":
                self._forget()
        elif self._continue_token:
            if status in (400, 410):
                # The token has expired. Whoever is too slow for pages takes all at once.
                self._forget()
                self._page_limit = 0
        elif status in (400, 422):
            self._streaming = False

    def _closed(self, seconds: float) -> None:
        if self._version is not None:
            # The server took the watch. What went wrong before is over, though one that only ever
            # takes and closes is not to be asked at once.
            self._silent_ends = min(self._silent_ends, 1)
            self._answer.has_progress |= seconds >= LONG_ENOUGH_SECONDS
        elif not self._answer.is_useless:
            self._cut_list()
            # Left open in silence, it never meant to mark the end of its list.
            self._streaming &= seconds < SILENT_LIST_SECONDS

    def _cut_list(self) -> None:
        self._cut_lists += 1
        self._streaming &= self._cut_lists < MAX_CUT_LISTS

    def _back_off(self) -> float:
        """Return a wait that doubles with each end that brought nothing."""
        self._silent_ends = 0 if self._answer.has_progress else self._silent_ends + 1
        doublings = min(self._silent_ends, 10)
        return self._spread(min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**doublings))

    def _spread(self, seconds: float) -> float:
        return seconds * (0.5 + 0.5 * self._random())

"""Tells which of many sockets are ready: an edge-triggered epoll inside the event loop.

A socket is registered once in its life, and closing it ends that. Edge-triggered: each change is
told once, so whoever leaves something undone must come back to it, or ask to be called ``again``.

The event loop of mode userspace waits on the same epoll, and while nothing else is to be done
stays in it: a round is one system call, and what the watchers do. Any other event loop watches one
file descriptor more, that of the epoll, and each round costs a turn of the loop.
"""

import asyncio
import os
import select
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import Context
from os import sched_yield
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector, SelectorKey
from socket import SocketType
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ENDED = select.EPOLLRDHUP  # the peer says nothing more
HUP = select.EPOLLHUP
ERROR = select.EPOLLERR
EDGE = select.EPOLLET
EVENTS_AT_ONCE = 64  # as many are passed on before the kernel is asked again
FOR_EVER = -1.0
AWAKE_SECONDS = 40e-6  # of one wait; in a virtual machine it takes about as long to be woken
SHORT_SECONDS = 2 * AWAKE_SECONDS  # of a wait asleep, to be woken included
Args = TypeVarTuple("Args")


class Watcher(Protocol):
    """Somebody who wants to know what happens to a socket."""

    def ready(self, events: int, /) -> bytes | None:
        """Return what was read, to have it written when all have been told: see Reader."""


class Reader(Watcher, Protocol):
    """A watcher who reads for others. All are of one kind."""

    @staticmethod
    def write_all(said: "Iterable[tuple[Any, bytes]]") -> "Iterable[Reader]":
        """Write what each of these has read; return those that may have more to read."""

    def abort(self) -> None:
        """Have both sides see that what was read is lost."""

    def pump(self) -> None:
        """Read and write what there is."""


class Poller:
    """Calls those whose sockets are ready, one after the other, in the event loop's thread."""

    def __init__(self, epoll: select.epoll) -> None:
        self.rounds = 0  # how often it has asked the kernel
        self._users = 0
        self._epoll = epoll
        self._watchers: dict[int, Watcher] = {}
        self._again: list[Callable[[], None]] = []
        self._closing: list[SocketType] = []
        self._is_telling = False

    @classmethod
    def of_loop(cls) -> "Poller":
        """Return the one of this event loop, to one more user; it is closed with the last."""
        loop = asyncio.get_running_loop()
        poller = loop.poller if isinstance(loop, RelayLoop) else _of_loops.get(loop)
        if poller is None:
            poller = _of_loops[loop] = cls(select.epoll())
            loop.add_reader(poller._epoll.fileno(), poller.look)
        poller._users += 1
        return poller

    def add(self, fd: int, events: int, watcher: Watcher) -> None:
        """Tell ``watcher`` from now on, and what is the case already. Raises ``OSError``."""
        self._epoll.register(fd, events)
        self._watchers[fd] = watcher

    def change(self, fd: int, events: int) -> None:
        """Watch for other events; what is the case already is told again."""
        self._epoll.modify(fd, events)

    def lead(self, fd: int, watcher: Watcher) -> None:
        """Tell somebody else from now on."""
        self._watchers[fd] = watcher

    def watches(self, fd: int) -> bool:
        return fd in self._watchers

    def discard(self, fd: int) -> None:
        """Forget a socket that stays open."""
        if self._watchers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def close_sockets(self, *sockets: SocketType) -> None:
        """Close sockets and forget them.

        Their numbers must not be others' before all events that the kernel has told are passed on.
        """
        for sock in sockets:
            self._watchers.pop(sock.fileno(), None)
        self._closing += sockets
        if not self._is_telling:
            self._close()

    def again(self, call: Callable[[], None]) -> None:
        """Call when others have had their turn."""
        if not self._again:
            asyncio.get_running_loop().call_soon(self._repeat)
        self._again.append(call)

    def close(self) -> None:
        """Let go of it: each user once."""
        self._users -= 1
        loop = asyncio.get_running_loop()
        if not self._users and _of_loops.get(loop) is self:
            del _of_loops[loop]
            loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def look(self) -> None:
        """Pass on the events there are."""
        self.tell(self._epoll.poll(0, EVENTS_AT_ONCE))

    def tell(self, found: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pass on these events of one round; return those that nobody watches."""
        self.rounds += 1
        watcher_of = self._watchers.get
        others: list[tuple[int, int]] = []
        said: list[tuple[Any, bytes]] = []
        self._is_telling = True
        for fd, events in found:
            watcher = watcher_of(fd)
            if watcher is None:
                others.append((fd, events))
                continue
            try:
                data = watcher.ready(events)  # others are told but once, too
            except Exception as error:
                tell_of(error)
                continue
            if data is not None:
                said.append((watcher, data))
        if said:
            self._write(said)
        self._is_telling = False
        if self._closing:
            self._close()
        return others

    def _close(self) -> None:
        for sock in self._closing:
            sock.close()
        self._closing.clear()

    def _write(self, said: list[tuple[Any, bytes]]) -> None:
        """Let the readers write what they have read in this round."""
        readers: Iterable[Reader] = ()
        try:
            readers = said[0][0].write_all(said)
        except Exception as error:
            tell_of(error)
            for reader, _data in said:
                reader.abort()
        for reader in readers:
            try:
                reader.pump()
            except Exception as error:  # others may have more to read, too
                tell_of(error)

    def _repeat(self) -> None:
        calls, self._again = self._again, []
        for call in calls:
            try:
                call()
            except Exception as error:  # others wait for their turn, too
                tell_of(error)


def tell_of(error: Exception) -> None:
    fields = {"message": "what becomes of a socket is not known", "exception": error}
    asyncio.get_running_loop().call_exception_handler(fields)


class RelayLoop(asyncio.SelectorEventLoop):
    """An event loop that leaves its poller only for something else to do."""

    def __init__(self) -> None:
        self._inside = Inside()
        self.poller = self._inside.poller
        super().__init__(self._inside)

    def call_soon(
        self,
        callback: Callable[[*Args], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.Handle:
        self._inside.is_wanted = True
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Args], object],
        *args: *Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self._inside.is_wanted = True
        return super().call_at(when, callback, *args, context=context)


class Keys(Mapping["FileDescriptorLike", SelectorKey]):
    """What the loop has registered, by file descriptor or by who has it, closed or not."""

    def __init__(self, by_fd: Mapping[int, SelectorKey]) -> None:
        self._by_fd = by_fd

    def __getitem__(self, fileobj: "FileDescriptorLike") -> SelectorKey:
        fd = descriptor(fileobj)
        if fd in self._by_fd:
            return self._by_fd[fd]
        for key in self._by_fd.values() if fd < 0 else ():
            if key.fileobj is fileobj:
                return key
        raise KeyError(fileobj)

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_fd)

    def __len__(self) -> int:
        return len(self._by_fd)


class Inside(BaseSelector):
    """What the event loop waits in: the poller, which also has the loop's own file descriptors."""

    def __init__(self) -> None:
        self.is_wanted = False  # the loop has been given something to do
        self._is_close = False  # events follow one shortly after the other
        self._has_company = len(os.sched_getaffinity(0)) > 1  # who calls us has a processor, too
        self._epoll = select.epoll()
        self.poller = Poller(self._epoll)
        self._keys: dict[int, SelectorKey] = {}  # by file descriptor
        self._map = Keys(self._keys)

    def register(
        self, fileobj: "FileDescriptorLike", events: int, data: object = None
    ) -> SelectorKey:
        fd = descriptor(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        self._epoll.register(fd, asked(events))
        key = self._keys[fd] = SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: "FileDescriptorLike") -> SelectorKey:
        key = self._map[fileobj]
        del self._keys[key.fd]
        if not self.poller.watches(key.fd):  # it is closed, and its number a watcher's by now
            with suppress(OSError):  # it is closed already
                self._epoll.unregister(key.fd)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Tell the poller's watchers until the loop has something to do itself."""
        self.is_wanted = False
        seconds = FOR_EVER if timeout is None else max(timeout, 0.0)
        now, poll = monotonic(), self._epoll.poll
        until = now + seconds
        while True:
            if self._is_close and seconds:
                found = self._stay_awake(now, seconds)
            else:
                found = poll(seconds, EVENTS_AT_ONCE)
                is_lone = len(found) == 1 and self._has_company
                self._is_close = is_lone and monotonic() - now < SHORT_SECONDS
            others = self.poller.tell(found)
            if others or self.is_wanted or not seconds:
                return [found for fd, events in others for found in self._known(fd, events)]
            now = monotonic()
            if seconds != FOR_EVER:
                seconds = max(until - now, 0.0)

    def _stay_awake(self, began_at: float, seconds: float) -> list[tuple[int, int]]:
        """Return what happens soon, or else what happens while asleep.

        To fall asleep and to be woken costs more than a short wait does, time and processor. So
        after a wait that was short the next is spent awake, unless it turns out to be long.
        """
        poll = self._epoll.poll
        found = poll(0, EVENTS_AT_ONCE)
        self._is_close = not found
        while not found and monotonic() - began_at < AWAKE_SECONDS:
            sched_yield()  # to whoever has something to do
            found = poll(0, EVENTS_AT_ONCE)
        if not found:
            self._is_close = False
            found = poll(seconds, EVENTS_AT_ONCE)
        return found

    def _known(self, fd: int, events: int) -> Iterator[tuple[SelectorKey, int]]:
        key = self._keys.get(fd)
        if key is not None:
            mask = (events & ~OUT and EVENT_READ) | (events & ~IN and EVENT_WRITE)
            yield key, mask & key.events

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()

    def get_map(self) -> Mapping["FileDescriptorLike", SelectorKey]:
        return self._map


def descriptor(fileobj: "FileDescriptorLike") -> int:
    """Return its number; of what is closed, -1."""
    return fileobj if isinstance(fileobj, int) else fileobj.fileno()


def asked(events: int) -> int:
    return (events & EVENT_READ and IN) | (events & EVENT_WRITE and OUT)


_of_loops: dict[asyncio.AbstractEventLoop, Poller] = {}

"""Tells which of many sockets are ready: an edge-triggered epoll inside the event loop.

The event loop watches one file descriptor, that of the epoll. A socket is registered once in its
life, and closing it ends that. Edge-triggered: each change is told once, so whoever leaves
something undone must come back to it, or ask to be called ``again``.
"""

import asyncio
import select
from collections.abc import Callable
from socket import SocketType
from typing import Protocol

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ENDED = select.EPOLLRDHUP  # the peer says nothing more
HUP = select.EPOLLHUP
ERROR = select.EPOLLERR
EDGE = select.EPOLLET
EVENTS_AT_ONCE = 64  # as many are passed on before the kernel is asked again


class Watcher(Protocol):
    """Somebody who wants to know what happens to a socket."""

    def ready(self, events: int, /) -> None: ...


class Poller:
    """Calls those whose sockets are ready, one after the other, in the event loop's thread."""

    def __init__(self) -> None:
        self.rounds = 0  # how often it has asked the kernel
        self._users = 1
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}
        self._again: list[Callable[[], None]] = []
        self._closing: list[SocketType] = []
        self._is_telling = False
        self._loop.add_reader(self._epoll.fileno(), self._look)

    @classmethod
    def of_loop(cls) -> "Poller":
        """Return the one of this event loop, to one more user; it is closed with the last."""
        loop = asyncio.get_running_loop()
        poller = _of_loops.get(loop)
        if poller is None:
            poller = _of_loops[loop] = cls()
        else:
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

    def discard(self, fd: int) -> None:
        """Forget a socket that stays open."""
        if self._watchers.pop(fd, None) is not None and not self._epoll.closed:
            self._epoll.unregister(fd)

    def close_socket(self, sock: SocketType) -> None:
        """Close a socket and forget it.

        Its number must not be another's before all events that the kernel has told are passed on.
        """
        self._watchers.pop(sock.fileno(), None)
        if self._is_telling:
            self._closing.append(sock)
        else:
            sock.close()

    def again(self, call: Callable[[], None]) -> None:
        """Call when others have had their turn."""
        if not self._again:
            self._loop.call_soon(self._repeat)
        self._again.append(call)

    def close(self) -> None:
        """Let go of it: each user once."""
        self._users -= 1
        if not self._users:
            if _of_loops.get(self._loop) is self:
                del _of_loops[self._loop]
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _look(self) -> None:
        self.rounds += 1
        watcher_of = self._watchers.get
        self._is_telling = True
        try:
            for fd, events in self._epoll.poll(0, EVENTS_AT_ONCE):
                watcher = watcher_of(fd)
                if watcher is not None:
                    watcher.ready(events)
        finally:
            self._is_telling = False
            for sock in self._closing:
                sock.close()
            self._closing.clear()

    def _repeat(self) -> None:
        calls, self._again = self._again, []
        for call in calls:
            call()


_of_loops: dict[asyncio.AbstractEventLoop, Poller] = {}

"""One worker process, as the process that started it sees it."""

import asyncio
import logging
import socket
import subprocess
from collections import Counter, deque
from collections.abc import Sequence

from pyproxy.counters import Counts
from pyproxy.model import Address, Frontend, Proto
from pyproxy.proxier._channel import REPORTS, Answer, Channel, Observed, Order
from pyproxy.proxier._dataplane import Observe

ANSWER_SECONDS = 10.0  # until a worker that does not answer is given up

log = logging.getLogger(__name__)

Sums = dict[tuple[Frontend, Address | None], Counts]


class Member:
    """One worker process, as this process sees it."""

    def __init__(
        self,
        number: int,
        process: "subprocess.Popen[bytes]",
        sock: socket.socket,
        observe: Observe,
    ) -> None:
        self.number = number
        self.process = process
        self.is_ready = False  # it has all frontends
        self.counts: Sums = {}  # as of the last time somebody asked
        self.ended = asyncio.Event()
        self._observe = observe
        self._open: Counter[Proto] = Counter()
        self._questions: deque[asyncio.Future[Answer | None]] = deque()
        self._channel = Channel(sock, self._hear, self._over)

    def tell(self, order: Order, fds: Sequence[int] = ()) -> None:
        self._channel.send(order, fds)

    async def ask(self, order: Order, fds: Sequence[int] = ()) -> Answer | None:
        """Return the answer; None if the worker has ended. One that gives none is killed."""
        if self.ended.is_set():
            return None
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._questions.append(future)
        self._channel.send(order, fds)
        try:
            return await asyncio.wait_for(asyncio.shield(future), ANSWER_SECONDS)
        except TimeoutError:
            log.error("a worker does not answer", extra={"worker": self.number})
            self.kill()
            return None

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self._channel.close()
        self._over()

    def _hear(self, message: bytes, _fds: list[int]) -> None:
        match REPORTS.decode(message):
            case Observed(results):
                for proto, result, count in results:
                    self._open[proto] += {"forwarded": count, "closed": -count}.get(result, 0)
                    for _ in range(count):
                        self._observe(proto, result)
            case answer:
                future = self._questions.popleft()
                if not future.done():
                    future.set_result(answer)

    def _over(self) -> None:
        if self.ended.is_set():
            return
        self.ended.set()
        self.is_ready = False
        for future in self._questions:
            if not future.done():
                future.set_result(None)
        for proto, count in self._open.items():  # nobody else will tell that they are over
            for _ in range(count):
                self._observe(proto, "closed")

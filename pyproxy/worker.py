"""A worker process of mode userspace begins here; the process that plans starts it."""

import asyncio
import gc
import socket
import sys

import msgspec

from pyproxy import __version__
from pyproxy.log import setup
from pyproxy.proxier._channel import Begin, receive_first
from pyproxy.proxier._poller import RelayLoop
from pyproxy.proxier._worker import Worker

ANOTHER_VERSION = 1  # what is installed has changed since: the next start of all is the remedy


def main() -> int:
    """Serve as told over the socket whose descriptor is the last argument."""
    sock = socket.socket(fileno=int(sys.argv[-1]))
    try:
        begin, fds = receive_first(sock)
    except msgspec.ValidationError:
        return ANOTHER_VERSION
    if not isinstance(begin, Begin) or begin.version != __version__:
        return ANOTHER_VERSION
    setup(begin.logging)
    gc.set_threshold(*begin.collector)

    async def work() -> None:
        await Worker(begin, fds, sock).run()

    with asyncio.Runner(loop_factory=RelayLoop) as runner:
        runner.run(work())
    return 0


if __name__ == "__main__":
    sys.exit(main())

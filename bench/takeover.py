"""A restart of mode userspace under load: who is cut off, and how long nobody answers.

python -m bench.takeover [--rounds 5] [--connections 1000] [--json FILE]

A process serves one Service to connections that stay open and to new ones all the time. Then it
is replaced: told to end (TERM) while its successor starts, or killed (KILL) with the next start
right after. What is measured is the same for no replacement at all, in the same run.
"""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._cluster import NODE, NODE_IP
from bench._lab import environment, isolate, make_network, warm_up

VIP, PORT = "10.96.0.77", 80
WORKERS = (1, 2)
ENDS: Mapping[str, signal.Signals | None] = {
    "none": None,
    "TERM": signal.SIGTERM,
    "KILL": signal.SIGKILL,
}
BEFORE_SECONDS, AFTER_SECONDS = 1.0, 2.0
PERIOD_SECONDS = 0.002  # between new connections
ANSWER_SECONDS = 5.0
START_SECONDS = 30.0


class Figures(NamedTuple):
    """Of new connections: how many, how many failed, the longest time without an answer. Of those
    that were open: how many were lost, and how many there were.
    """

    new: int
    failed: int
    gap_seconds: float
    lost: int
    kept_open: int


class Load:
    """New connections, one after another: one byte each way."""

    def __init__(self) -> None:
        self.failed = 0
        self.answered_at: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        while True:
            task = asyncio.create_task(self._one())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(PERIOD_SECONDS)

    async def _one(self) -> None:
        if await answered(await connected()):
            self.answered_at.append(asyncio.get_running_loop().time())
        else:
            self.failed += 1

    async def end(self) -> None:
        await asyncio.gather(*self._tasks)

    def gap_seconds(self) -> float:
        times = sorted(self.answered_at)
        return max(b - a for a, b in pairwise(times))


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected() -> Stream | None:
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asyncio.open_connection(VIP, PORT)
    return None


async def answered(stream: Stream | None, *, keep: bool = False) -> bool:
    """Say whether the backend answers on a connection, and close it unless it is to be kept."""
    if stream is None:
        return False
    reader, writer = stream
    try:
        writer.write(b"x")
        async with asyncio.timeout(ANSWER_SECONDS):
            return await reader.read(1) == b"x"
    except (OSError, TimeoutError):
        return False
    finally:
        if not keep:
            writer.close()


@asynccontextmanager
async def pyproxy(folder: Path, workers: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a process until the end of the block; it serves at its beginning."""
    words = [
        "-m", "pyproxy", "run", f"--manifests={folder / 'objects.json'}",
        "--proxy-mode=userspace", "--userspace-socket-lb=off", f"--userspace-workers={workers}",
        f"--userspace-runtime-dir={folder}", f"--control-socket={folder / 'control.sock'}",
        f"--hostname-override={NODE}", "--metrics-bind-address=", "--healthz-bind-address=",
        f"--state-dir={folder}",
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, env=environment(), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            while b'"serving"' not in (line := await process.stderr.readline()):
                assert line, "pyproxy has ended"
        reading = asyncio.create_task(process.stderr.read())
        yield process
        reading.cancel()  # workers that are left have the pipe, too
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def measured(how: signal.Signals | None, workers: int, count: int) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backend = await asyncio.start_server(echo, NODE_IP, 0, backlog=4096)
        folder.joinpath("objects.json").write_text(manifest(backend.sockets[0].getsockname()[1]))
        async with pyproxy(folder, workers) as first:
            opened = [stream for _ in range(count) if (stream := await connected()) is not None]
            assert all([await answered(stream, keep=True) for stream in opened])
            load = Load()
            running = asyncio.create_task(load.run())
            await asyncio.sleep(BEFORE_SECONDS)
            if how == signal.SIGKILL:
                first.send_signal(how)
            if how is None:
                await asyncio.sleep(AFTER_SECONDS)
                lost = await lost_of(opened)
            else:
                async with pyproxy(folder, workers):
                    if how == signal.SIGTERM:
                        with suppress(ProcessLookupError):
                            first.send_signal(how)
                    await asyncio.sleep(AFTER_SECONDS)
                    lost = await lost_of(opened)
                    running.cancel()
                    await load.end()
            running.cancel()
            await load.end()
        backend.close()
    new = len(load.answered_at) + load.failed
    return Figures(new, load.failed, load.gap_seconds(), lost, len(opened))


async def lost_of(opened: list[Stream]) -> int:
    return [await answered(stream) for stream in opened].count(False)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(4096):
            writer.write(data)
    writer.close()


def manifest(port: int) -> str:
    """Return a Service whose endpoint is on this node."""
    meta = {"name": "web", "namespace": "default"}
    labels = {"kubernetes.io/service-name": "web"}
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": meta,
        "spec": {"clusterIP": VIP, "clusterIPs": [VIP], "ports": [{"port": PORT}]},
    }  # fmt: skip
    piece = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {**meta, "labels": labels}, "addressType": "IPv4",
        "ports": [{"port": port}], "endpoints": [{"addresses": [NODE_IP]}],
    }  # fmt: skip
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [service, piece]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=1000, help="that stay open")
    parser.add_argument("--json", type=lambda text: Path(text).absolute())
    options = parser.parse_args()
    isolate("bench.takeover")
    make_network()
    warm_up()
    results = {}
    print(f"{'workers, end':14}" + "".join(f"{name:>14}" for name in Figures._fields))
    for workers in WORKERS:
        for name, how in ENDS.items():
            rounds = []
            for _ in range(options.rounds):
                rounds.append(uvloop.run(measured(how, workers, options.connections)))
                subprocess.run([sys.executable, "-m", "pyproxy", "cleanup"], check=True)
            found = Figures(*(max(column) for column in zip(*rounds, strict=True)))
            middle = median(figures.gap_seconds for figures in rounds)
            results[f"{workers}, {name}"] = {**found._asdict(), "median gap": middle}
            cells = "".join(f"{value:>14.4g}" for value in found)
            print(f"{f'{workers}, {name}':14}{cells}   median gap {middle:.3f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

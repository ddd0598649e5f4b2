"""What the tests under load share: many trials at once, and what may be left after them."""

import asyncio
import os

TRIALS = int(os.environ.get("TRIALS", "150"))  # 20000, to be sure
AT_ONCE = 32


def open_files():
    return len(os.listdir("/proc/self/fd"))


def connection_counts(node):
    fronts = node.frontends._fronts._held.values()
    return [dict(held.front.picker._open) for held in fronts if held.front is not None]


async def becomes(wanted, measured):
    """Wait until what is measured is as wanted, for some seconds; return what it is.

    After very many trials longer: where a queue of the kernel was full, ends are sent again late.
    """
    for _ in range(max(200, TRIALS // 4)):
        if measured() == wanted:
            break
        await asyncio.sleep(0.02)
    return measured()


async def repeated(trial, *, times=TRIALS, at_once=AT_ONCE):
    """Run ``trial(number)`` many times, some at once; return what was not None, each once."""
    numbers, found = iter(range(times)), set()

    async def worker():
        for number in numbers:
            async with asyncio.timeout(10):
                found.add(await trial(number))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(worker())
    return found - {None}

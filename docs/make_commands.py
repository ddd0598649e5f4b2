"""Fills docs/commands.md with what the commands really say.

Each line ``$ COMMAND`` of a console block is carried out, in a lab of network namespaces with a
daemon on its first node, and what follows in the block is replaced by its output:

    python -m docs.make_commands [--check]

With ``--check`` nothing is written; the exit code is 1 if the page says anything else, but for
times, and figures of ``pyproxy top``, for which there is traffic while it looks. It needs what
``pyproxy demo`` needs, and nftables.
"""

import asyncio
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from pyproxy.demo.cluster import NODES
from pyproxy.demo.expect import ORIGINS
from pyproxy.demo.traffic import ask
from pyproxy.model import Address
from tests.netns.stage import Stage, folder_of, isolated, staged

PAGE = Path(__file__).with_name("commands.md")
DEFAULT_MODE = "nftables"  # of a block; another one is written after "console"
SETTLE_SECONDS = 3.0  # so that ages are not those of the first moment
BLOCK = re.compile(r"^```console ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOP = re.compile(r"^\$ pyproxy top .*\n(?:[^$`].*\n)*", re.MULTILINE)
FIGURES = re.compile(r" +(?:[\d.]+[kMG]?|-)(?= |$)| +$", re.MULTILINE)
OUTSIDE = next(origin for origin in ORIGINS if origin.name == "outside")
ANSWER_SECONDS = 0.3
ASKED = {  # the seconds between two requests
    Address("198.18.0.10", 80): 0.02,
    Address("198.18.0.21", 80): 0.2,  # to which this client may not come
    Address("10.96.188.97", 80): 0.1,
}
TIMES = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\b\d+[smh] *$", re.MULTILINE)


async def filled(page: str, mode: str, stage: Stage) -> str:
    """Return the page with the output of the commands of one mode."""
    parts: list[str] = []
    end = 0
    for block in BLOCK.finditer(page):
        if (block[1] or DEFAULT_MODE) == mode:
            parts.append(page[end : block.start(2)])
            for line in commands(block[2]):
                parts += [f"$ {line}\n", await output_of(line, stage)]
            end = block.end(2)
    return "".join((*parts, page[end:]))


def commands(block: str) -> Iterator[str]:
    return (line[2:] for line in block.splitlines() if line.startswith("$ "))


async def output_of(line: str, stage: Stage) -> str:
    program, *words = shlex.split(line)
    if program == "pyproxy":
        async with traffic(stage) if words[0] == "top" else nullcontext():
            code, output, errors = await stage.command(*words)
        ended = f"(exit code {code})\n" if code else ""
        return output + errors + ended
    with stage.lab.inside(NODES[0].name):
        return told_by([program, *words])


@asynccontextmanager
async def traffic(stage: Stage) -> AsyncIterator[None]:
    """Have a client ask some Services, one of them more often than another, for a while."""
    async with asyncio.TaskGroup() as tasks:
        asking = [
            tasks.create_task(again_and_again(stage, where, pause), name=f"ask {where}")
            for where, pause in ASKED.items()
        ]
        yield
        for task in asking:
            task.cancel()


async def again_and_again(stage: Stage, where: Address, pause: float) -> None:
    while True:
        await ask(stage.lab.socket(OUTSIDE.namespace, where.ip), where, ANSWER_SECONDS)
        await asyncio.sleep(pause)


def lasting(page: str) -> str:
    """Return what of the page must be the same the next time."""
    return TOP.sub(lambda found: FIGURES.sub("", found[0]), TIMES.sub("", page))


def told_by(words: list[str]) -> str:
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        output, _ = process.communicate()
    return output


def in_lab(mode: str, page: str) -> str:
    """Return the page with the output of one mode's commands; the process stays in the lab."""
    lab = isolated()

    async def made(folder: Path) -> str:
        async with staged(lab, folder, mode) as stage:
            stage.stricter()
            await asyncio.sleep(SETTLE_SECONDS)
            return await filled(page, mode, stage)

    with TemporaryDirectory(prefix="pyproxy-docs-") as folder:
        return asyncio.run(made(folder_of(folder)))


def made_by_child(mode: str, page: str) -> str:
    words = [sys.executable, "-m", "docs.make_commands", "--fill", mode]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        output, _ = process.communicate(page)
    if process.returncode:
        sys.exit(process.returncode)
    return output


def main(words: list[str]) -> int:
    if words[:1] == ["--fill"]:
        sys.stdout.write(in_lab(words[1], sys.stdin.read()))
        return 0
    page = now = PAGE.read_text(encoding="utf-8")
    for mode in sorted({block[1] or DEFAULT_MODE for block in BLOCK.finditer(page)}):
        now = made_by_child(mode, now)
    if words == ["--check"]:
        return int(lasting(now) != lasting(page))
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

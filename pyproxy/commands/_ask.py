"""Where a command's answer comes from: a daemon's socket, manifests, or an API server, once."""

import argparse
import asyncio
import http.client
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar
from urllib.parse import urlencode

import msgspec

from pyproxy.commands import CommandError
from pyproxy.config import Config, node_name
from pyproxy.config.flags import Options, parse
from pyproxy.config.flags_kinds import BOOL
from pyproxy.config.flags_table import FLAGS
from pyproxy.ip import parse_network
from pyproxy.model import FAMILIES, GATING, ApiObject, Change, Family, Kind, Remove, Replace, Upsert
from pyproxy.offline import Objects, view_of
from pyproxy.questions import QUESTIONS, VERSION
from pyproxy.settings import file_text, loaded
from pyproxy.view import Answer, Complaint, NotThereError, QueryError
from pyproxy.written import Entries

SOCKET_SECONDS = 30.0
LIST_SECONDS = 60.0
DEFAULT_MODE = "nftables"
WITHOUT_DAEMON = " (-f FILE and --kubeconfig FILE work without one)"
A = TypeVar("A", bound=Answer)


class Source(Protocol):
    """Who answers."""

    @property
    def is_live(self) -> bool: ...

    def ask(self, question: str, kind: type[A], query: Mapping[str, str]) -> A:
        """Return the answer. Raises ``CommandError`` with what is wrong with the question."""
        ...


class NoDaemonError(CommandError):
    """Nobody answers at the socket."""


class Daemon:
    """The pyproxy that serves this node, by its socket."""

    is_live = True

    def __init__(self, path: str, hint: str = "") -> None:
        self._path = path
        self._hint = hint  # what else can be done where nobody answers

    def ask(self, question: str, kind: type[A], query: Mapping[str, str]) -> A:
        """Raises ``NoDaemonError`` where nobody answers."""
        connection = _Connection(self._path)
        try:
            connection.request("GET", f"/{VERSION}/{question}?{urlencode(query)}")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise NoDaemonError(
                f"no pyproxy answers at {self._path}: {reason}{self._hint}"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise CommandError(msgspec.json.decode(body, type=Complaint).error)
        return msgspec.json.decode(body, type=kind)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("pyproxy", timeout=SOCKET_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SOCKET_SECONDS)
        self.sock.connect(self._path)


class Files:
    """A plan made here, of objects that were read once."""

    is_live = False

    def __init__(self, objects: Objects, config: Config, mode: str, node: str) -> None:
        self.own_ips: frozenset[str] | None = None  # of the node, where they are known
        self.commented = True  # as rules of iptables are on the node, where that is known
        self.service_cidrs: tuple[str, ...] = ()  # likewise; those of the objects come first
        self.objects = objects
        self.config = config
        self.view = view_of(objects, config, mode, node, FAMILIES)

    def ask(self, question: str, kind: type[A], query: Mapping[str, str]) -> A:
        answer: Answer
        try:
            if question == "entries":
                answer = self._entries()
            elif question in QUESTIONS:
                answer = QUESTIONS[question](self.view, query)
            else:
                raise CommandError(f"{question}: only a running pyproxy knows; leave out -f")
        except (QueryError, NotThereError) as error:
            raise CommandError(str(error)) from error
        assert isinstance(answer, kind), "the table of questions says so"
        return answer

    def _entries(self) -> Entries:
        from pyproxy.render import Settings, entries_of

        settings = Settings(
            self.view.node,
            self.config,
            own_ips=self.own_ips,
            service_cidrs=self.service_cidrs,
            commented=self.commented,
        )
        return entries_of(self.view.mode, self.objects, settings)


def parser(
    name: str, description: str, *, without_daemon: str = WITHOUT_DAEMON
) -> argparse.ArgumentParser:
    """Return a parser with what all commands have.

    ``without_daemon`` is what to say where none answers; empty: only a daemon can. Then files are
    not in the help, and whoever gives some is told so.
    """
    epilog = "Asks the pyproxy that serves this node, at --control-socket."
    if without_daemon:
        epilog += (
            " With -f or --kubeconfig it answers by itself, and all flags of pyproxy run count that"
            " rules depend on, such as --config, --cluster-cidr, --nodeport-addresses and"
            " --masquerade-all."
        )
    made = argparse.ArgumentParser(
        prog=f"pyproxy {name}", description=description, epilog=epilog, allow_abbrev=False
    )
    made.set_defaults(without_daemon=without_daemon)

    def shown(text: str) -> str:
        return text if without_daemon else argparse.SUPPRESS

    made.add_argument(
        "-f", "--filename", action="append", default=[], metavar="PATH",
        help=shown("a file or a directory of manifests, or - for standard input; again for more"),
    )  # fmt: skip
    made.add_argument(
        "--node-name", metavar="NAME", help=shown("with -f: like --hostname-override")
    )
    made.add_argument("--mode", metavar="MODE", help=shown(f"with -f (default: {DEFAULT_MODE})"))
    made.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="default: %(default)s"
    )
    return made


def parsed(
    made: argparse.ArgumentParser, words: Sequence[str]
) -> tuple[argparse.Namespace, Source]:
    """Read the words; return them with who answers. Raises ConfigError and ``SettingsError``."""
    shared, rest = divided(words)
    own = made.parse_args(rest)
    if own.mode is not None:
        shared.append(f"--proxy-mode={own.mode}")
    if own.node_name is not None:
        shared.append(f"--hostname-override={own.node_name}")
    options = parse(shared)
    own.options = options
    return own, source(options, own.filename, own.without_daemon)


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the flags of ``pyproxy run``, with their values, from a command's own words."""
    shared: list[str] = []
    rest: list[str] = []
    following = iter(words)
    for word in following:
        flag = FLAGS.get(word[2:].partition("=")[0]) if word.startswith("--") else None
        if flag is None or flag.name == "help":
            rest.append(word)
        else:
            shared.append(word)
            if "=" not in word and flag.kind is not BOOL:
                shared += [value for value in (next(following, None),) if value is not None]
    return shared, rest


def source(options: Options, files: Sequence[str], without_daemon: str) -> Source:
    if not files and not options.master and "kubeconfig" not in options.given:
        return Daemon(options.control_socket, without_daemon)
    hostname = socket.gethostname()
    config, _ = loaded(options, file_text(options), hostname)
    node = node_name(config, hostname)
    mode = DEFAULT_MODE if config.mode == "auto" else config.mode
    if files:
        objects = of_files(files, node, options.service_cidr, config)
    else:
        objects = asyncio.run(of_server(options, config, node))
    return Files(objects, config, mode, node)


def of_files(
    files: Sequence[str], node: str, service_cidrs: Sequence[str], config: Config
) -> Objects:
    """Return what the files mean; what is odd about it is told. Raises ``CommandError``."""
    from pyproxy.manifests.resolve import Settings
    from pyproxy.render import RenderError, read

    cidrs = tuple(cidr for text in service_cidrs if (cidr := parse_network(text)) is not None)
    try:
        found = read(files, Settings(node, cidrs, config.service_proxy_name))
    except RenderError as error:
        raise CommandError(*error.args) from error
    for remark in (*found.notes, *(f"{s.name}: {w}" for s in found.services for w in s.warnings)):
        tell(remark)
    return found.objects()


async def of_server(options: Options, config: Config, node: str) -> Objects:
    """List everything once. Raises ``CommandError``."""
    from pyproxy.feeds import FeedError, feed_from
    from pyproxy.metrics import Metrics

    objects: dict[Kind, Sequence[ApiObject]] = {}
    listed = asyncio.Event()

    def take(change: Change) -> None:
        match change:
            case Replace(kind=kind, objects=found):
                objects[kind] = found
            case Upsert() | Remove():  # later than the list, which is enough
                pass
        if all(kind in objects for kind in GATING):
            listed.set()

    families: tuple[Family, ...] = FAMILIES
    try:
        feed = await feed_from(options, config, node, Metrics(DEFAULT_MODE, families))
    except FeedError as error:
        raise CommandError(str(error)) from error
    try:
        async with asyncio.timeout(LIST_SECONDS), asyncio.TaskGroup() as tasks:
            following = tasks.create_task(feed.follow(take), name="list")
            await listed.wait()
            following.cancel()
    except TimeoutError as error:
        raise CommandError(f"the API server did not list everything in {LIST_SECONDS:.0f} s") from (
            error
        )
    finally:
        await feed.aclose()
    return objects


def service_named(text: str) -> str:
    """Return the NAMESPACE/NAME of ``service/NAMESPACE/NAME``. Raises ``CommandError``."""
    kind, _, name = text.partition("/")
    if kind.lower() not in ("service", "services", "svc") or name.count("/") != 1:
        raise CommandError(f"{text} is not service/NAMESPACE/NAME")
    return name


def as_json(answer: Answer) -> str:
    return msgspec.json.format(msgspec.json.encode(answer), indent=2).decode() + "\n"


def show(text: str) -> None:
    sys.stdout.write(text)


def tell(line: str) -> None:
    sys.stderr.write(f"pyproxy: {line}\n")

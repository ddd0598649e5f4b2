"""What a mode would make of the objects in manifest files, as text: for people, nothing is written.

Offline, the node has the addresses that its manifest gives it, those that a setting names, and
no others.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, cast

from msgspec import Struct
from msgspec.structs import replace

from pyproxy.config import (
    Config,
    is_beside,
    local_pods,
    masquerade_all,
    networks_of,
    node_port_cidrs,
    with_mode,
)
from pyproxy.ip import is_loopback, parse_network
from pyproxy.manifests.objects import Documents, Fault
from pyproxy.manifests.resolve import Memory, Resolved, resolve
from pyproxy.manifests.resolve import Settings as ManifestSettings
from pyproxy.manifests.source import SUFFIXES
from pyproxy.manifests.text import ManifestTextError, documents_of
from pyproxy.model import (
    FAMILIES,
    ApiObject,
    Family,
    Kind,
    Node,
    PortPlan,
    ServiceCIDR,
    family_of,
)
from pyproxy.offline import family_view, node_in
from pyproxy.plan import Plan
from pyproxy.reconcile import CompileOwner
from pyproxy.rules import (
    iptables,
    iptables_file,
    ipvs,
    ipvs_base,
    listeners,
    nft_base,
    nft_beside,
    nft_file,
)
from pyproxy.rules import ipvs_text as ipvs_file
from pyproxy.rules.entries import Entry, entries, fixed_of_iptables, fixed_of_table
from pyproxy.rules.iptables_base import has_localhost
from pyproxy.rules.listeners_text import treatments
from pyproxy.rules.nft_affinity import Content
from pyproxy.rules.nftables import Item, Ruleset, compile_owner
from pyproxy.written import Entries, EntryRow, FamilyEntries

STDIN = "-"
DEFAULT_MODE = "nftables"
Objects = Mapping[Kind, Sequence[ApiObject]]


class RenderError(Exception):
    """There is nothing to print; each argument is one line that says why."""


class Request(Struct, frozen=True):
    """What is to be rendered, besides the settings that every command has."""

    files: tuple[str, ...]
    families: tuple[Family, ...] = FAMILIES


class Settings(Struct, frozen=True):
    """What rules depend on besides the objects."""

    node_name: str
    config: Config = Config()
    families: tuple[Family, ...] = FAMILIES
    own_ips: frozenset[str] | None = None  # of the node's interfaces; None: those of its Node
    commented: bool = True  # as rules of iptables are, but in flavour legacy
    service_cidrs: tuple[str, ...] = ()  # where there is no ServiceCIDR


class Scene(NamedTuple):
    """The plan of one family, and the node that it is for."""

    family: Family
    plan: Plan
    config: Config
    node: Node
    service_cidrs: tuple[str, ...]
    own_ips: frozenset[str]  # of the node, in this family
    commented: bool


class ListenerRow(NamedTuple):
    """A line of the table of mode userspace."""

    service: str
    address: str
    whom: str
    what: str
    backends: str


class Rendered(NamedTuple):
    """What to print, and what to tell about it."""

    text: str
    remarks: tuple[str, ...] = ()


# --- for the command line -------------------------------------------------------------------------


def request(words: Sequence[str]) -> tuple[Request, list[str]]:
    """Read what is the command's own; return it with the flags that all commands share."""
    parser = argparse.ArgumentParser(
        prog="pyproxy render",
        description="Print the rules that this node would have for the Services in some manifests."
        " Needs no cluster and no root.",
        epilog="All flags of pyproxy run count as well, such as --config, --cluster-cidr,"
        " --service-cidr, --nodeport-addresses and --masquerade-all.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-f", "--filename", action="append", default=[], metavar="PATH",
        help="a file or a directory of manifests, or - for standard input; again for more",
    )  # fmt: skip
    parser.add_argument(
        "--mode", metavar="MODE", help=f"{', '.join(RENDERERS)} (default: {DEFAULT_MODE})"
    )
    parser.add_argument("--node-name", metavar="NAME", help="like --hostname-override")
    parser.add_argument(
        "--family", type=int, choices=FAMILIES, help="one family only (default: both)"
    )
    own, shared = parser.parse_known_args(words)
    if own.mode is not None:
        shared.append(f"--proxy-mode={own.mode}")
    if own.node_name is not None:
        shared.append(f"--hostname-override={own.node_name}")
    families = FAMILIES if own.family is None else (own.family,)
    return Request(tuple(own.filename), families), shared


def rendered(
    wanted: Request, config: Config, node_name: str, service_cidrs: Iterable[str]
) -> Rendered:
    """Read the files and return their rules. Raises ``RenderError``."""
    mode = DEFAULT_MODE if config.mode == "auto" else config.mode
    if not wanted.files:
        raise RenderError("-f is missing: give a file or a directory of manifests, or - for stdin")
    cidrs = tuple(cidr for text in service_cidrs if (cidr := parse_network(text)) is not None)
    found = read(wanted.files, ManifestSettings(node_name, cidrs, config.service_proxy_name))
    of_families = scenes(mode, found.objects(), Settings(node_name, config, wanted.families))
    warnings = [f"{s.name}: {warning}" for s in found.services for warning in s.warnings]
    conflicts = {
        conflict: None
        for scene in of_families
        for conflicts in scene.plan.conflicts.values()
        for conflict in conflicts
    }
    failed = [f"{owner}: {why}" for s in of_families for owner, why in s.plan.failed.items()]
    return Rendered(RENDERERS[mode](of_families), (*found.notes, *warnings, *conflicts, *failed))


def read(paths: Iterable[str], settings: ManifestSettings) -> Resolved:
    """Return what the files mean. Raises ``RenderError`` with everything that is wrong in them."""
    contents: dict[str, Documents] = {}
    faults: list[Fault] = []
    for path in paths:
        for name, file in files_in(path):
            try:
                contents[name] = documents(file)
            except (OSError, UnicodeDecodeError, ManifestTextError) as error:
                faults.append(Fault(name, why(error)))
    found = resolve(contents, Memory(), settings)
    faults += found.faults
    if faults:
        raise RenderError(*map(str, faults))
    return found


def why(error: Exception) -> str:
    match error:
        case OSError(strerror=str(text)):
            return text
        case UnicodeDecodeError(start=start):
            return f"byte {start} is not UTF-8"
        case _:
            return str(error)


def files_in(path: str) -> list[tuple[str, Path | None]]:
    """Return the files a path means, with the names to tell them by; None is standard input."""
    if path == STDIN:
        return [("stdin", None)]
    root = Path(path)
    if not root.is_dir():
        return [(path, root)]
    found = (
        file
        for file in sorted(root.rglob("*"))
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    return [(str(file), file) for file in found]


def documents(file: Path | None) -> Documents:
    if file is None:
        return documents_of(sys.stdin.read(), is_json=False)
    return documents_of(file.read_text(encoding="utf-8-sig"), is_json=file.suffix == ".json")


# --- rules ----------------------------------------------------------------------------------------


def scenes(mode: str, objects: Objects, settings: Settings) -> tuple[Scene, ...]:
    """Plan the objects for each family."""
    config = with_mode(settings.config, mode)
    node = node_in(objects, settings.node_name)
    cidrs = {
        cidr
        for obj in objects.get("ServiceCIDR", ())
        if isinstance(obj, ServiceCIDR)
        for cidr in obj.cidrs
    }
    own = assumed_ips(config, node) if settings.own_ips is None else settings.own_ips
    return tuple(
        Scene(
            family,
            family_view(family, objects, config, node).plan,
            config,
            node,
            tuple(sorted(cidrs)) or settings.service_cidrs,
            frozenset(ip for ip in own if family_of(ip) == family),
            settings.commented,
        )
        for family in settings.families
    )


def assumed_ips(config: Config, node: Node) -> frozenset[str]:
    """Return the addresses of a node that nobody asks: also those that a setting names."""
    ranges = [n for family in FAMILIES for n in node_port_cidrs(config, family, node.ips) or ()]
    named = {str(n.network_address) for n in ranges if n.num_addresses == 1}
    return frozenset({*node.ips, *named, "127.0.0.1"})


def by_owner(plan: Plan) -> list[PortPlan]:
    return [plan.ports[owner] for owner in sorted(plan.ports)]


def entries_of(mode: str, objects: Objects, settings: Settings) -> Entries:
    """Return the entries that a mode would have for the objects, and its fixed part."""
    made = []
    for scene in scenes(mode, objects, settings):
        compiled = COMPILERS[mode](scene)
        items: dict[Any, Any] = {}
        for port in by_owner(scene.plan):
            items |= compiled(port, {})
        found = (*FIXED[mode](scene), *entries(scene.family, items))
        rows = tuple(EntryRow(*entry) for entry in found)
        made.append(FamilyEntries(scene.family, rows))
    return Entries(mode, tuple(made))


def nftables_text(found: Iterable[Scene]) -> str:
    """Return files for ``nft -f``, one after another: each replaces the table of its family."""
    return "\n".join(map(nft_table_text, found))


def nft_table_text(scene: Scene) -> str:
    ruleset = nft_ruleset(scene)
    items: dict[Item, Content] = {}
    for port in by_owner(scene.plan):
        items |= compile_owner(ruleset, port, {})
    return nft_file.file(nft_table_base(scene), ruleset, items)


def nft_table_base(scene: Scene) -> nft_file.Base:
    return nft_beside if is_beside(scene.config) else nft_base


def nft_ruleset(scene: Scene) -> Ruleset:
    config, family = scene.config, scene.family
    block = config.nftables if config.mode == "nftables" else config.iptables
    return Ruleset(
        family=family,
        mark=1 << block.masquerade_bit,
        pods=local_pods(config, family, scene.node, "*"),
        masquerade_all=masquerade_all(config, config.mode),
        node_port_ips=serving(scene),
        service_cidrs=() if is_beside(config) else networks_of(scene.service_cidrs, family),
        service_metrics=config.service_metrics,
    )


def serving(scene: Scene, *, loopback: bool = False) -> tuple[str, ...] | None:
    """Return the node's addresses that serve node ports, in order; None is every one it has."""
    ranges = node_port_cidrs(scene.config, scene.family, scene.node.ips)
    if ranges is None:
        return None
    inside = (ip for ip in scene.own_ips if any(ip_address(ip) in network for network in ranges))
    return tuple(sorted(ip for ip in inside if loopback or not is_loopback(ip)))


def iptables_text(found: Iterable[Scene]) -> str:
    """Return files for ``iptables-restore --noflush`` and its IPv6 twin, one after another."""
    files: list[str] = []
    for scene in found:
        ruleset = iptables_ruleset(scene)
        items: dict[iptables.Item, iptables.Content] = {}
        for port in by_owner(scene.plan):
            items |= iptables.compile_owner(ruleset, port, {})
        files.append(iptables_file.files(ruleset, items))
    return "\n".join(files)


def iptables_ruleset(scene: Scene) -> iptables.Ruleset:
    config, family = scene.config, scene.family
    ranges = node_port_cidrs(config, family, scene.node.ips)
    localhost = family == 4 and config.iptables.localhost_node_ports and has_localhost(ranges)
    return iptables.Ruleset(
        family=family,
        mark=1 << config.iptables.masquerade_bit,
        pods=local_pods(config, family, scene.node, "+"),
        masquerade_all=masquerade_all(config, "iptables"),
        node_port_ips=serving(scene, loopback=localhost),
        localhost_node_ports=localhost,
        commented=scene.commented,
    )


def ipvs_text(found: Iterable[Scene]) -> str:
    """Return input of ``ipvsadm -R``, whose lines begin with -A or -a, and then of ``nft -f``."""
    servers, tables = [], []
    for scene in found:
        ruleset = ipvs_ruleset(scene)
        items: ipvs.Items = {}
        for port in by_owner(scene.plan):
            items |= ipvs.compile_owner(ruleset, port, {})
        servers.append(ipvs_file.text(items))
        own = {key: items[key] for key in items if isinstance(key, Item)}
        tables.append(nft_file.file(ipvs_base, ruleset.table, cast(Mapping[Item, Content], own)))
    return "\n".join(["".join(servers), *tables])


def ipvs_ruleset(scene: Scene) -> ipvs.Ruleset:
    config = scene.config
    found = serving(scene)
    addresses = map(ip_address, sorted(scene.own_ips) if found is None else found)
    node_ips = tuple(str(ip) for ip in addresses if not (ip.is_loopback or ip.is_link_local))
    table = replace(nft_ruleset(scene), node_port_ips=node_ips)
    return ipvs.Ruleset(table, node_ips, config.ipvs.scheduler or ipvs.FALLBACK)


def listeners_table(found: Iterable[Scene]) -> str:
    """Return who is served what at each address, and by whom."""
    rows = [ListenerRow("SERVICE", "ADDRESS", "FOR", "WHAT", "BACKENDS")]
    for scene in found:
        for port in by_owner(scene.plan):
            for route in port.routes:
                where = str(port.owner), str(route.frontend)
                rows += [ListenerRow(*where, *row) for row in treatments(route)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(f"{line(row, widths)}\n" for row in rows)


def line(row: ListenerRow, widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


COMPILERS: Mapping[str, Callable[[Scene], CompileOwner[Any, Any]]] = {
    "nftables": lambda scene: partial(compile_owner, nft_ruleset(scene)),
    "iptables": lambda scene: partial(iptables.compile_owner, iptables_ruleset(scene)),
    "ipvs": lambda scene: partial(ipvs.compile_owner, ipvs_ruleset(scene)),
    "userspace": lambda scene: listeners.compile_owner,
}
FIXED: Mapping[str, Callable[[Scene], tuple[Entry, ...]]] = {
    "nftables": lambda scene: fixed_of_table(nft_table_base(scene), nft_ruleset(scene)),
    "iptables": lambda scene: fixed_of_iptables(iptables_ruleset(scene)),
    "ipvs": lambda scene: fixed_of_table(ipvs_base, ipvs_ruleset(scene).table),
    "userspace": lambda scene: (),
}
RENDERERS: Mapping[str, Callable[[Sequence[Scene]], str]] = {
    "nftables": nftables_text,
    "iptables": iptables_text,
    "ipvs": ipvs_text,
    "userspace": listeners_table,
}

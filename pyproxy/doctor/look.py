"""Looks at this node and writes down what there is. It changes nothing, and decides nothing.

What cannot be looked at is noted, with the reason, and never stops the rest. Here is what costs
milliseconds; see ``look_closer`` for the rest.
"""

import asyncio
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from msgspec.structs import replace

from pyproxy.config import Config
from pyproxy.doctor.facts import Facts, Finding, Link, Tracked
from pyproxy.doctor.findings import worth_a_warning
from pyproxy.model import Family

SYSCTLS: Final = (
    "net/ipv4/ip_forward",
    "net/ipv6/conf/all/forwarding",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
)
COUNT, MAX = "net/netfilter/nf_conntrack_count", "net/netfilter/nf_conntrack_max"
IFF_UP: Final = 1
T = TypeVar("T")
U = TypeVar("U")


class Looked(NamedTuple):
    """Where things of the kernel are, which tests move."""

    root: Path = Path("/")

    def text(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None


def quickly(config: Config, mode: str, families: Sequence[Family]) -> Facts:
    """Return what costs a few milliseconds to find out, and blocks. Raises nothing."""
    files = Looked()
    facts = Facts(mode, families=tuple(families))
    facts, links = attempted(facts, "network interfaces", lambda: tuple(read_links()), ())
    names = [f"net/ipv4/conf/{link.name}/rp_filter" for link in links]
    sysctls = {n: v for n in (*SYSCTLS, *names) if (v := files.text(f"proc/sys/{n}")) is not None}
    return replace(
        facts,
        sysctls=sysctls,
        has_read_only_sysctls=is_read_only(Path("/proc/sys")),
        links=links,
        uplinks=default_ways(files.text("proc/net/route") or ""),
        tracked=tracked(files),
        schedulers=(config.ipvs.scheduler or "rr",),
    )


async def at_start(
    config: Config, families: Sequence[Family], pod_cidrs: Sequence[str], cidrs: Sequence[str]
) -> tuple[Finding, ...]:
    """Return what is wrong, as far as a few milliseconds tell. Raises nothing."""
    try:
        facts = await asyncio.to_thread(quickly, config, config.mode, families)
        return worth_a_warning(
            replace(
                facts,
                pod_cidrs=tuple(pod_cidrs),
                service_cidrs=tuple(cidrs),
                open_files=open_files(),
            )
        )
    except Exception as error:  # a look must not keep the proxy from its work
        return (
            Finding(
                "note",
                "doctor",
                "this node could not be looked at",
                f"{type(error).__name__}: {error}",
            ),
        )


def open_files() -> int:
    """Return how many files this process may open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class CannotLookError(Exception):
    """Something cannot be looked at; the text says why."""


def attempted(facts: Facts, what: str, look: Callable[[], T], otherwise: U) -> tuple[Facts, T | U]:
    """Look; where that cannot be done, note why."""
    try:
        return facts, look()
    except (OSError, CannotLookError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return replace(facts, unseen=(*facts.unseen, (what, reason))), otherwise


# --- interfaces -----------------------------------------------------------------------------------


def read_links() -> Iterator[Link]:
    """Yield the interfaces of this network namespace, read through pyroute2."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        links, addresses = list(ip.get_links()), list(ip.get_addr())
    names = {link["index"]: link.get("ifname") for link in links}
    networks: dict[int, list[str]] = {}
    for a in addresses:
        text = f"{a.get('local') or a.get('address')}/{a['prefixlen']}"
        networks.setdefault(a["index"], []).append(text)
    for link in links:
        info = link.get("linkinfo")
        port = info.get("slave_data") if info else None
        yield Link(
            name=link.get("ifname"),
            kind=(info.get("kind") if info else None) or "",
            mtu=link.get("mtu"),
            master=names.get(link.get("master")) or "",
            hairpin=bool(port and port.get("IFLA_BRPORT_MODE")),
            networks=tuple(networks.get(link["index"], ())),
            is_up=bool(link["flags"] & IFF_UP),
        )


def default_ways(routes: str) -> tuple[str, ...]:
    """Return the interfaces of default routes in ``/proc/net/route``."""
    rows = (line.split() for line in routes.splitlines()[1:])
    return tuple(dict.fromkeys(row[0] for row in rows if row[1] == row[7] == "00000000"))


def is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def tracked(files: Looked) -> Tracked | None:
    count, limit = files.text(f"proc/sys/{COUNT}"), files.text(f"proc/sys/{MAX}")
    return Tracked(int(count), int(limit)) if count and limit else None

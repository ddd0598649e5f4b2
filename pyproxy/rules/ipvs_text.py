"""Virtual servers as people know them: the text of ``ipvsadm -S``, which ``ipvsadm -R`` reads."""

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address

from pyproxy.model import Address, Frontend, Proto
from pyproxy.rules.ipvs import Content, Destination, Key, Server

PROTOS: Mapping[Proto, str] = {"TCP": "-t", "UDP": "-u", "SCTP": "--sctp-service"}
# The flags of proxier/_ipvsnl.py. The last one marks what is ours.
FLAGS: Mapping[str, str] = {"sh": "sh-fallback,flag-3", "mh": "mh-fallback,mh-port,flag-3"}
OURS = "flag-3"


def text(items: Mapping[Key, Content]) -> str:
    """Return a line for each virtual server and each destination, in the order of addresses."""
    servers = {key: c for key, c in items.items() if isinstance(c, Server)}
    destinations: dict[Frontend, list[tuple[Address, int]]] = {}
    for key, content in items.items():
        if isinstance(key, Destination) and isinstance(content, int):
            destinations.setdefault(key.server, []).append((key.address, content))
    ordered = sorted((key for key in servers if isinstance(key, Frontend)), key=frontend_order)
    lines = (
        line
        for frontend in ordered
        for line in server_lines(frontend, servers[frontend], destinations.get(frontend, ()))
    )
    return "".join(f"{line}\n" for line in lines)


def server_lines(
    frontend: Frontend, server: Server, destinations: Iterable[tuple[Address, int]]
) -> Iterator[str]:
    where = f"{PROTOS[frontend.proto]} {Address(frontend.ip, frontend.port)}"
    affinity = ""
    if server.affinity_seconds is not None:
        affinity = f" -p {server.affinity_seconds}" + (" -M 128" if ":" in frontend.ip else "")
    yield f"-A {where} -s {server.scheduler}{affinity} -b {FLAGS.get(server.scheduler, OURS)}"
    for address, weight in sorted(destinations, key=lambda found: address_order(found[0])):
        yield f"-a {where} -r {address} -m -w {weight}"


def frontend_order(frontend: Frontend) -> tuple[bytes, int, str]:
    return (*address_order(Address(frontend.ip, frontend.port)), frontend.proto)


def address_order(address: Address) -> tuple[bytes, int]:
    return ip_address(address.ip).packed, address.port

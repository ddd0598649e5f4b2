"""``pyproxy get``: what is programmed, at which version, since when."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pyproxy.commands._ask import as_json, parsed, parser, show
from pyproxy.commands._table import age, table
from pyproxy.listing import (
    Conflicts,
    EndpointRow,
    Endpoints,
    PortStatus,
    RouteRow,
    Routes,
    Services,
    ServiceStatus,
)
from pyproxy.view import Answer


class Sheet(NamedTuple):
    """How one kind of thing is printed."""

    type: type[Answer]
    text: Callable[[Any], str]


def main(words: Sequence[str]) -> int:
    made = parser("get", "Print what this node has programmed, or would.")
    made.add_argument("what", choices=SHEETS, help=", ".join(SHEETS), metavar="WHAT")
    made.add_argument("service", nargs="?", default="", metavar="NAMESPACE/NAME")
    made.add_argument("-n", "--namespace", default="", help="only this namespace")
    options, source = parsed(made, words)
    query = {"service": options.service, "namespace": options.namespace}
    sheet = SHEETS[options.what]
    answer = source.ask(options.what, sheet.type, {k: v for k, v in query.items() if v})
    show(as_json(answer) if options.output == "json" else sheet.text(answer))
    return 0


def services_text(answer: Services) -> str:
    now = datetime.now(UTC)
    rows = [row for item in answer.items for row in service_rows(item, now)]
    head = ("SERVICE", "TYPE", "PORT", "BACKENDS", "VERSION", "STATE", "SINCE")
    errors = "".join(f"last sync failed: {error}\n" for error in answer.errors)
    return table(head, rows) + errors


def service_rows(item: ServiceStatus, now: datetime) -> list[Sequence[str]]:
    name = f"{item.namespace}/{item.name}"
    start = (name, item.type)
    if not item.ports:
        return [(*start, "", "", item.resource_version, "not served", "")]
    return [
        (
            *start, port_text(port), f"{port.backends}/{port.endpoints}", item.resource_version,
            port.state, age(port.since, now),
        )
        for port in item.ports
    ]  # fmt: skip


def port_text(port: PortStatus) -> str:
    name = f"{port.port}:" if port.port else ""
    return f"{name}{port.number}/{port.proto}" + ("" if port.family == 4 else " IPv6")


def endpoints_text(answer: Endpoints) -> str:
    head = ("SERVICE", "ADDRESS", "POD", "NODE", "ZONE", "CONDITIONS", "USED")
    return table(head, (endpoint_row(item) for item in answer.items))


def endpoint_row(item: EndpointRow) -> Sequence[str]:
    port = f":{item.port}" if item.port else ""
    here = " (here)" if item.local else ""
    return (
        f"{item.namespace}/{item.service}{port}", item.address, item.pod, f"{item.node}{here}",
        item.zone, ",".join(item.conditions) or "not ready", "yes" if item.used else "no",
    )  # fmt: skip


def routes_text(answer: Routes) -> str:
    head = ("FRONTEND", "KIND", "SERVICE", "PODS", "NODE", "OUTSIDE")
    limited = any(item.allowed_sources is not None for item in answer.items)
    note = "* only for loadBalancerSourceRanges\n" if limited else ""
    return table(head, (route_row(item) for item in answer.items)) + note


def route_row(item: RouteRow) -> Sequence[str]:
    port = f":{item.port}" if item.port else ""
    limited = "" if item.allowed_sources is None else " *"
    return (
        item.frontend, item.kind + limited, f"{item.namespace}/{item.service}{port}",
        brief(item.from_pod), brief(item.from_node), brief(item.from_outside),
    )  # fmt: skip


def brief(action: str) -> str:
    return action.replace("forward to ", "to ").replace(", masquerade", " masq")


def conflicts_text(answer: Conflicts) -> str:
    if not answer.items:
        return f"{answer.node}: no conflicts\n"
    return "".join(f"{item.kind}: {item.problem}\n" for item in answer.items)


SHEETS: Mapping[str, Sheet] = {
    "services": Sheet(Services, services_text),
    "endpoints": Sheet(Endpoints, endpoints_text),
    "routes": Sheet(Routes, routes_text),
    "conflicts": Sheet(Conflicts, conflicts_text),
}

"""``pyproxy wait``: until this node does what the API server says of a Service."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from pyproxy.commands import CommandError
from pyproxy.commands._ask import (
    NoDaemonError,
    Source,
    as_json,
    parsed,
    parser,
    service_named,
    show,
)
from pyproxy.config.text import parse_duration
from pyproxy.listing import PortStatus, ServiceStatus, Status

POLL_SECONDS = 0.1

Condition = Callable[[Status], str | None]  # why it is not so yet; None when it is


def main(words: Sequence[str]) -> int:
    made = parser(
        "wait", "Wait until this node has written what a Service asks for.", without_daemon=""
    )
    made.add_argument("object", metavar="service/NAMESPACE/NAME")
    made.add_argument(
        "--for", dest="what", default="programmed", metavar="WHAT",
        help="programmed, endpoints=N or absent (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--resource-version", type=int, default=0, metavar="N",
        help="and until the Service is known at this version, or a newer one",
    )  # fmt: skip
    made.add_argument("--timeout", default="30s", metavar="TIME", help="default: %(default)s")
    own, source = parsed(made, words)
    if not source.is_live:
        raise CommandError("wait: only a running pyproxy writes anything; leave out -f")
    name = service_named(own.object)
    condition = at_version(condition_of(own.what), own.resource_version)
    try:
        seconds = parse_duration(own.timeout)
    except ValueError as error:
        raise CommandError(f"--timeout: {error}") from error
    status = asyncio.run(until(source, name, condition, seconds))
    show(as_json(status) if own.output == "json" else f"{own.object}: {own.what}\n")
    return 0


async def until(source: Source, name: str, condition: Condition, seconds: float) -> Status:
    """Ask until it is so. A daemon that restarts meanwhile is waited for as well."""
    why, query = "", {"service": name}
    try:
        async with asyncio.timeout(seconds):
            while True:
                try:
                    status = await asyncio.to_thread(source.ask, "status", Status, query)
                    reason = condition(status)
                    if reason is None:
                        return status
                    why = reason
                except NoDaemonError as error:
                    why = str(error)
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError as error:
        raise CommandError(f"wait: after {seconds:g} s {why or 'there is no answer'}") from error


def condition_of(text: str) -> Condition:
    """Return what ``--for`` means. Raises ``CommandError``."""
    if text in CONDITIONS:
        return CONDITIONS[text]
    word, _, number = text.partition("=")
    if word == "endpoints" and number.isdecimal():
        return with_endpoints(int(number))
    raise CommandError(f"--for: {text} is not programmed, endpoints=N or absent")


def programmed(status: Status) -> str | None:
    item = status.item
    if item is None:
        return f"{status.node} knows of no such Service"
    if not item.ports:
        return f"it is not served: {', '.join(item.not_served) or 'it has no ports'}"
    for port in item.ports:
        if port.state != "programmed":
            return not_yet(status, item, port)
    return None


def not_yet(status: Status, item: ServiceStatus, port: PortStatus) -> str:
    why = "; ".join((*port.problems, *status.errors))
    name = f"{item.namespace}/{item.name}, port {port.number}/{port.proto} (IPv{port.family})"
    return f"{name} is {port.state}{': ' * bool(why)}{why}"


def absent(status: Status) -> str | None:
    if status.item is not None:
        return "the Service is there"
    return f"{status.leaving} of its ports are still to be removed" if status.leaving else None


def with_endpoints(count: int) -> Condition:
    """Return the condition that each port is written and leads to so many endpoints."""

    def condition(status: Status) -> str | None:
        reason = programmed(status)
        if reason is not None:
            return reason
        ports = status.item.ports if status.item is not None else ()
        for port in ports:
            if port.backends != count:
                return f"port {port.number}/{port.proto} leads to {port.backends}, not {count}"
        return None

    return condition


def at_version(condition: Condition, version: int) -> Condition:
    """Return the condition that also asks for a version of the Service."""

    def both(status: Status) -> str | None:
        known = status.item.resource_version if status.item is not None else ""
        if version and not (known.isdecimal() and int(known) >= version):
            return f"the Service is known at version {known or 'none'}, not {version}"
        return condition(status)

    return both


CONDITIONS: Mapping[str, Condition] = {"programmed": programmed, "absent": absent}

"""What the demo's requests must come back with, and whether they did.

The expectations are written down here a second time, as the API documents them: they would be
worth nothing if they were computed by the code that they judge.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pyproxy.demo.cluster import (
    CLIENT,
    NODES,
    POD_LABELS,
    SHELL,
    Object,
    Pod,
    ServiceAddress,
    selects,
)
from pyproxy.model import FrontendKind

OriginName = Literal["pod", "node", "outside"]
Seen = Literal["its own", "the node's"]


class Reply(NamedTuple):
    """What became of one request: ``ok`` with who answered, or a word for the failure."""

    result: str
    pod: str = ""
    client: str = ""  # the address that the pod saw


class Origin(NamedTuple):
    """Where requests are sent from."""

    name: OriginName
    namespace: str
    ips: frozenset[str]


class Case(NamedTuple):
    """One line of the table: an address, asked from one place, and what must come of it."""

    asked: ServiceAddress
    origin: Origin
    pods: frozenset[str]  # who must answer, each of them and nobody else; empty: refused
    seen: Seen = "the node's"

    @property
    def result(self) -> str:
        return "ok" if self.pods else "refused"

    def __str__(self) -> str:
        return f"{self.asked.service} at {self.asked.address} from {self.origin.name}"


class Check(NamedTuple):
    """Something that should be so, and what is wrong with it: nothing, when it is."""

    name: str
    complaints: tuple[str, ...] = ()


HERE = NODES[0]
ORIGINS = (
    Origin("pod", SHELL.name, frozenset(SHELL.ips)),
    Origin("node", HERE.name, HERE.ips),
    Origin("outside", CLIENT.name, frozenset(CLIENT.ips)),
)

# Who keeps the client's address: (kind, whether external policy Local applies, origin).
KEEPS: frozenset[tuple[FrontendKind, bool, OriginName]] = frozenset(
    {
        ("ClusterIP", False, "pod"),
        ("LoadBalancer", True, "pod"),
        ("LoadBalancer", True, "outside"),
        ("NodePort", True, "pod"),
        ("NodePort", True, "outside"),
    }
)

# Modes that choose by chance need this many requests to reach each of six pods for certain: it
# fails once in ten million rows.
MOST_REQUESTS = 100
LEAST_REQUESTS = 24
LEAST_REFUSALS = 3


def cases(
    addresses: Iterable[ServiceAddress], services: Iterable[Object], pods: Sequence[Pod]
) -> tuple[Case, ...]:
    """Return what must be true of every address, asked from everywhere."""
    empty = {
        service["metadata"]["name"] for service in services if not selects(service, POD_LABELS)
    }
    return tuple(
        Case(
            asked,
            origin,
            frozenset() if asked.service in empty else _answering(asked, origin, pods),
            _seen(asked, origin),
        )
        for asked in addresses
        for origin in ORIGINS
    )


def _answering(asked: ServiceAddress, origin: Origin, pods: Iterable[Pod]) -> frozenset[str]:
    only_here = asked.local and origin.name == "outside"
    return frozenset(pod.name for pod in pods if pod.node == HERE.name or not only_here)


def _seen(asked: ServiceAddress, origin: Origin) -> Seen:
    kept = (asked.kind, asked.local, origin.name) in KEEPS
    return "its own" if kept else "the node's"


def enough(case: Case, replies: Sequence[Reply]) -> bool:
    """Say whether more requests could teach nothing, or would be too many."""
    if len(replies) >= MOST_REQUESTS or any(reply.result != case.result for reply in replies[-1:]):
        return True
    if not case.pods:
        return len(replies) >= LEAST_REFUSALS
    return len(replies) >= LEAST_REQUESTS and {reply.pod for reply in replies} >= case.pods


def judged(case: Case, replies: Sequence[Reply]) -> Check:
    """Hold what came back against what must."""
    complaints = [
        f"{count} of {len(replies)} requests {_was(result)}, not {case.result}"
        for result, count in Counter(reply.result for reply in replies).items()
        if result != case.result
    ]
    answered = {reply.pod for reply in replies if reply.pod}
    if case.pods and "ok" in {reply.result for reply in replies}:
        complaints += [f"{pod} answered and should not" for pod in sorted(answered - case.pods)]
        complaints += [f"{pod} never answered" for pod in sorted(case.pods - answered)]
        complaints += _unexpected_clients(case, replies)
    return Check(str(case), tuple(complaints))


def _was(result: str) -> str:
    return "succeeded" if result == "ok" else result


def _unexpected_clients(case: Case, replies: Iterable[Reply]) -> list[str]:
    allowed = case.origin.ips if case.seen == "its own" else HERE.ips
    seen = {reply.client for reply in replies if reply.client}
    return [
        f"pods saw the client as {ip} and not as {case.seen} address"
        for ip in sorted(seen - allowed)
    ]


class Update(NamedTuple):
    """What a rolling update under load was like for the clients."""

    requests: int
    failures: tuple[str, ...]  # what each failed request came back with
    seconds: float
    late: tuple[str, ...]  # new pods that got no request in time


def judged_update(update: Update) -> tuple[Check, ...]:
    failed = Counter(update.failures)
    return (
        Check(
            "no request fails during the rolling update",
            tuple(
                f"{count} of {update.requests} requests {_was(result)}"
                for result, count in sorted(failed.items())
            ),
        ),
        Check(
            "each new pod gets requests once it is ready",
            tuple(f"{pod} was ready and got none" for pod in update.late),
        ),
    )


def explained(services: Iterable[Object], addresses: Iterable[ServiceAddress]) -> tuple[str, ...]:
    """Say why each Service without pods refuses, for somebody who did not expect it."""
    address_by_service = {asked.service: asked.address for asked in addresses}
    sentences = []
    for service in services:
        if not selects(service, POD_LABELS):
            name = service["metadata"]["name"]
            sentences.append(
                f"{name} ({address_by_service[name]}) refuses connections, as it should:"
                f" no pod matches its selector {_labels(service['spec']['selector'])}"
                f" (the pods are labelled {_labels(POD_LABELS)})."
            )
    return tuple(sentences)


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())

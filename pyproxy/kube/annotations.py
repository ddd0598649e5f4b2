"""What the annotations that pyproxy reads say. No annotation makes an object unusable."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NoReturn, cast

from pyproxy.ip import canonical_ip
from pyproxy.model import (
    BALANCER_TRAFFIC,
    SCHEDULERS,
    BalancerTraffic,
    Scheduler,
    WeightRule,
)

WEIGHTS: Final = "pyproxy.io/weights"
SCHEDULER: Final = "pyproxy.io/scheduler"
BALANCER_TRAFFIC_NAME: Final = "pyproxy.io/load-balancer-traffic"
ELB_PASS_THROUGH: Final = "kubernetes.io/elb.pass-through"
TRIGGER_TIME: Final = "endpoints.kubernetes.io/last-change-trigger-time"

MAX_WEIGHT: Final = 65535  # what IPVS keeps
LONGEST_SHOWN: Final = 60  # of what somebody wrote, in a message

_rule = re.compile(r"(ip|pod|node|zone)/(\S+)=(\d{1,5})", re.ASCII).fullmatch
_timestamp = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII
).fullmatch
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class AnnotationError(Exception):
    """An annotation says nothing that can be used; the text names it and the part that is wrong."""


def parse_weights(text: str) -> tuple[WeightRule, ...]:
    """Return the rules of ``pyproxy.io/weights``, in their order.

    One wrong part makes the whole annotation void: half of a weighting is a weighting that
    nobody asked for.
    """
    return tuple(_weight_rule(part.strip()) for part in text.split(",")) if text.strip() else ()


def parse_scheduler(text: str) -> Scheduler | None:
    name = text.strip()
    if name in SCHEDULERS:
        return name
    if not name:
        return None
    raise AnnotationError(
        f'annotation {SCHEDULER}: "{clipped(name)}" is not one of {", ".join(SCHEDULERS)}; '
        "it is ignored"
    )


def parse_balancer_traffic(text: str) -> BalancerTraffic | None:
    name = text.strip()
    if name in BALANCER_TRAFFIC:
        return name
    if not name:
        return None
    raise AnnotationError(
        f'annotation {BALANCER_TRAFFIC_NAME}: "{clipped(name)}" is not one of '
        f"{', '.join(BALANCER_TRAFFIC)}; it is ignored"
    )


def parse_elb_pass_through(text: str) -> BalancerTraffic | None:
    """Return what Huawei's CCE means by its annotation, which counts where it is asked for."""
    match text.strip():
        case "true":
            return "pass-through"
        case "onlyLocal":
            return "local-else-pass-through"
        case "" | "false":
            return None
        case other:
            raise AnnotationError(
                f'annotation {ELB_PASS_THROUGH}: "{clipped(other)}" is not true, false '
                "or onlyLocal; it is ignored"
            )


def parse_trigger_time(text: str) -> float:
    """Return RFC 3339 text with up to nanoseconds as Unix seconds."""
    match = _timestamp(text.strip())
    if match is None:
        _refuse_time(text)
    day, clock, fraction, zone = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{'+00:00' if zone in 'Zz' else zone}")
    except ValueError:
        _refuse_time(text)
    # datetime ends at microseconds, and so do we: a float holds no more of a Unix time.
    microseconds = int(f"{fraction or '.0'}000000"[1:7])
    return (moment - _EPOCH) / timedelta(seconds=1) + microseconds / 1e6


def clipped(text: str) -> str:
    """Return the beginning of a text, with a mark where it goes on."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _weight_rule(part: str) -> WeightRule:
    match = _rule(part)
    weight = int(match[3]) if match else 0
    if match is None or weight > MAX_WEIGHT:
        _refuse_weights(part, f"SELECTOR=WEIGHT with a weight of 0 to {MAX_WEIGHT}")
    pattern: str | None = match[2]
    if match[1] == "ip":
        pattern = canonical_ip(match[2])
    if pattern is None:
        _refuse_weights(part, "ip/ADDRESS=WEIGHT")
    return WeightRule(cast(Literal["ip", "pod", "node", "zone"], match[1]), pattern, weight)


def _refuse_weights(part: str, expected: str) -> NoReturn:
    raise AnnotationError(
        f'annotation {WEIGHTS}: "{clipped(part)}" is not {expected}; '
        "the whole annotation is ignored"
    )


def _refuse_time(text: str) -> NoReturn:
    raise AnnotationError(
        f'annotation {TRIGGER_TIME}: "{clipped(text)}" is not an RFC 3339 time; it is ignored'
    )

"""Packet counters of the kernel that rules count with: nfacct objects.

kube-proxy's metrics read these two, by these names. They live as long as a rule uses them, whatever
becomes of the rule's own counter. Linux: include/uapi/linux/netfilter/nfnetlink_acct.h.
"""

import errno
from collections.abc import Callable
from contextlib import closing
from typing import TypeVar

from pyproxy.proxier._netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    Netlink,
    attribute,
    attributes,
)
from pyproxy.rules.iptables_base import COUNTERS

SUBSYSTEM = 7 << 8
NEW, GET, DELETE = (SUBSYSTEM | n for n in (0, 1, 3))
ATTR_NAME, ATTR_PACKETS = 1, 2
NF_HEADER = bytes(4)
THERE = {0, errno.EEXIST, errno.EBUSY}
T = TypeVar("T")


def ensured() -> bool:
    """Create the counters unless they are there; say whether they are. A kernel may have none."""
    codes = asked(lambda netlink: netlink.carry_out([message(NEW, name) for name in COUNTERS]))
    return codes is not None and THERE.issuperset(codes)


def packets(name: str) -> int | None:
    """Return what a counter has counted; None if there is no such counter."""
    found = asked(lambda netlink: dict(map(read, netlink.dump(GET, NF_HEADER))))
    return None if found is None else found.get(name)


def remove() -> None:
    """Delete the counters, except those that rules still use."""
    asked(lambda netlink: netlink.carry_out([message(DELETE, name) for name in COUNTERS]))


def asked(ask: Callable[[Netlink], T]) -> T | None:
    try:
        with closing(Netlink(NETLINK_NETFILTER)) as netlink:
            return ask(netlink)
    except OSError:
        return None


def message(kind: int, name: str) -> Message:
    flags = NLM_F_CREATE | NLM_F_EXCL if kind == NEW else 0
    return Message(kind, flags, NF_HEADER + attribute(ATTR_NAME, name.encode() + b"\0"))


def read(payload: bytes) -> tuple[str, int]:
    found = dict(attributes(payload, len(NF_HEADER)))
    return found[ATTR_NAME].rstrip(b"\0").decode(), int.from_bytes(found[ATTR_PACKETS], "big")

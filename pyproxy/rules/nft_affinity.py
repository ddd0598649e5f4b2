"""Chains that remember their clients: session affinity in mode nftables.

Only Services with affinity have chains and sets of their own. Each endpoint has a set of clients,
filled by packets and emptied by time, which no sync touches; kube-proxy's rules have the same form.
"""

from base64 import b32encode
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from pyproxy.balancer import BY_CLIENT, BY_CONNECTIONS, slot_counts, turn_of
from pyproxy.model import Address, Pool, Scheduler, ServicePortName
from pyproxy.rules.nft import (
    Dnat,
    Element,
    MatchProto,
    MatchSet,
    Pick,
    PickKind,
    PickVerdict,
    Rule,
    Set,
    TypeName,
    UpdateSet,
    Verdict,
)

CHAIN = "chain"  # containers of items that are no elements
AFFINITY_SET = "affinity-set"
LONGEST_NAME = 230  # of an owner, to which words are added; NFT_NAME_MAXLEN is 256
LONGEST_TURN = 256  # slots of a pool, but for large ones
PICKS: Mapping[Scheduler | None, tuple[str, PickKind]] = {
    None: ("", "random"),
    "random": ("", "random"),
    "rr": ("-rr", "turn"),
    "wrr": ("-rr", "turn"),
    **dict.fromkeys(BY_CONNECTIONS, ("", "random")),  # no rule can count connections
    **dict.fromkeys(BY_CLIENT, ("-sh", "source")),
}

# Data of a map; an element with a verdict, a comment or an interval; the rules of a chain; a set.
Content = bytes | Element | tuple[Rule, ...] | Set


class Entrance(NamedTuple):
    """A chain to send connections to, and the chains and sets that must exist for it."""

    chain: str
    needs: tuple[tuple[str, str, Content], ...]  # container, name, content


def affine(owner: ServicePortName, pool: Pool, seconds: int, kind: str) -> Entrance:
    """Return the chain of a pool that remembers its clients."""
    chain = f"{kind}-{identity(owner)}"
    names = {b.address: endpoint_identity(owner, b.address) for b in pool.backends}
    known = [
        Rule(
            chain, (MatchSet(("saddr",), clients_of(n, seconds)), Verdict("goto", f"endpoint-{n}"))
        )
        for n in names.values()
    ]
    backends = turn(pool)
    verdicts = tuple(Verdict("goto", f"endpoint-{names[address]}") for address in backends)
    pick = Pick(PICKS[pool.scheduler][1], len(backends))
    needs: list[tuple[str, str, Content]] = []
    for address, name in names.items():
        clients = clients_of(name, seconds)
        needs.append((AFFINITY_SET, clients, affinity_set(clients, address, seconds)))
        needs.append((CHAIN, f"endpoint-{name}", endpoint_rules(owner, name, clients, address)))
    rules = (*known, Rule(chain, (PickVerdict(pick, verdicts),)))
    return Entrance(chain, (*needs, (CHAIN, chain, rules)))


def affinity_set(name: str, address: Address, seconds: int) -> Set:
    key: TypeName = "ipv6_addr" if ":" in address.ip else "ipv4_addr"
    return Set(name, (key,), flags=("dynamic", "timeout"), timeout_seconds=seconds)


def clients_of(name: str, seconds: int) -> str:
    """Return the name of an endpoint's set of clients: another time-out makes it another set."""
    return f"affinity-{name}/{seconds}s"


def endpoint_rules(
    owner: ServicePortName, name: str, clients: str, address: Address
) -> tuple[Rule, ...]:
    chain = f"endpoint-{name}"
    return (
        Rule(chain, (UpdateSet(clients, "saddr"),)),
        Rule(chain, (MatchProto(owner.proto), Dnat(address))),
    )


def turn(pool: Pool) -> tuple[Address, ...]:
    """Return the addresses of a pool's slots."""
    return turn_of(pool, longest=LONGEST_TURN)


def turn_length(pool: Pool) -> int:
    return sum(slot_counts(pool, longest=LONGEST_TURN))


def identity(owner: ServicePortName) -> str:
    """Return a name of an owner for chains: what people read, after what makes it unique."""
    return named(f"{owner.namespace}/{owner.service}/{owner.proto.lower()}/{owner.port}")


def endpoint_identity(owner: ServicePortName, address: Address) -> str:
    base = f"{owner.namespace}/{owner.service}/{owner.proto.lower()}/{owner.port}"
    return named(f"{base}__{address.ip.replace(':', '.')}/{address.port}")


@lru_cache(maxsize=4096)
def named(base: str) -> str:
    digest = b32encode(sha256(base.encode()).digest())[:8].decode()
    return f"{digest}-{base}"[:LONGEST_NAME]

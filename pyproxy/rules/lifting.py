"""Rules that lift answers out of a bridge: of backends that see a client on the same bridge.

Such a backend answers the client's address, and the bridge would carry the frame straight to the
client, past this node. Each packet of ours to the backend leaves a note in a map (the answer's
addresses and ports, and the bridge's own Ethernet address, which is the sender's there); a frame
that has one is readdressed to the bridge, and marked as for a socket of this node. Nobody need be
told of a connection that begins or ends: notes that nothing renews are gone after a while.

Later fragments have no ports. The first one leaves a note with the number that all have.
"""

from typing import Final

from pyproxy.model import Family, Proto
from pyproxy.rules.nft import (
    Chain,
    Field,
    Hook,
    MatchFamily,
    MatchFragment,
    MatchPriority,
    MatchProto,
    Readdress,
    Rule,
    Set,
    SetMark,
    Table,
    TakeFrame,
    UpdateMap,
    field_type,
)

# A socket's priority is for queueing disciplines, and none has this handle. A mark would say the
# same, but takes part in routing, and others test and set its bits.
PRIORITY: Final = 0x7079_0000
KEEPALIVE_SECONDS: Final = 30  # of a connection that is idle, so that its note stays
TCP_SECONDS: Final = 3 * KEEPALIVE_SECONDS
FRAGMENT_SECONDS: Final = 5
MOST_ANSWERS: Final = 1 << 20
MOST_FRAGMENTED: Final = 1 << 16
ANSWERS, FRAGMENTS = "answers", "fragments"
ANSWER: Final[tuple[Field, ...]] = ("saddr", "daddr", "l4proto", "sport", "dport")
QUESTION: Final[tuple[Field, ...]] = ("daddr", "saddr", "l4proto", "dport", "sport")
FRAGMENT: Final[tuple[Field, ...]] = ("saddr", "daddr", "id")
OUTPUT: Final = Chain("output", Hook("filter", "output", 0))
# Before IP's own rules, which the kernel runs at 0 where bridged packets are to meet them.
PREROUTING: Final = Chain("prerouting", Hook("filter", "prerouting", -300))
CHAINS: Final = (OUTPUT, PREROUTING)


def table(family: Family, name: str) -> Table:
    comment = "pyproxy, mode userspace: answers to clients on one bridge are ours"
    return Table(family, f"{name}-{family}", comment, bridge=True)


def sets(family: Family) -> tuple[Set, ...]:
    at = table(family, "")
    return tuple(
        Set(
            name,
            tuple(field_type(at, field) for field in fields),
            ("ether_addr",),
            ("dynamic", "timeout"),
            timeout_seconds=seconds,
            size=most,
        )
        for name, fields, seconds, most in (
            (ANSWERS, ANSWER, TCP_SECONDS, MOST_ANSWERS),
            (FRAGMENTS, FRAGMENT, FRAGMENT_SECONDS, MOST_FRAGMENTED),
        )
    )


def rules(mark: int, udp_seconds: int) -> tuple[Rule, ...]:
    """Return all rules. A datagram in either direction renews its note for so long."""
    seconds: dict[Proto, int] = {"TCP": TCP_SECONDS, "UDP": udp_seconds}
    ours = MatchFamily(), MatchPriority(PRIORITY)
    renew = UpdateMap(ANSWER, ANSWERS, "ether daddr", udp_seconds)
    remember = UpdateMap(FRAGMENT, FRAGMENTS, "ether daddr", FRAGMENT_SECONDS)
    answer, fragment = Readdress(ANSWER, ANSWERS), Readdress(FRAGMENT, FRAGMENTS)
    lift = TakeFrame(), SetMark(mark)
    first, later = MatchFragment("first"), MatchFragment("later")
    return (
        *(
            Rule(
                OUTPUT.name,
                (*ours, MatchProto(proto), UpdateMap(QUESTION, ANSWERS, "ether saddr", kept)),
            )
            for proto, kept in seconds.items()
        ),
        Rule(PREROUTING.name, (MatchFamily(), answer, *lift, MatchProto("UDP"), renew)),
        Rule(PREROUTING.name, (MatchFamily(), first, answer, remember)),
        Rule(PREROUTING.name, (MatchFamily(), later, fragment, *lift)),
    )

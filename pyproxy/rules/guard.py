"""The socket filter of a frontend that some sources may not use.

A classic BPF program on a listening socket sees each packet before the protocol does. What it
returns zero for is gone: no reset, no port unreachable. That is how a forwarder without packet
filter rules stays silent. Linux: Documentation/networking/filter.rst.
"""

from collections.abc import Iterable, Sequence
from ipaddress import collapse_addresses, ip_network
from typing import NamedTuple

from pyproxy.model import Drop, Family, Network, Route
from pyproxy.rules.listeners import Surroundings

LOAD_WORD = 0x20  # accumulator = the 32-bit word at k
AND = 0x54
JUMP = 0x05
JUMP_IF_EQUAL = 0x15
RETURN = 0x06

NETWORK_HEADER = 0xFFF00000  # offsets from here on count from the IP header
SOURCE_AT: dict[Family, int] = {4: 12, 6: 8}
ADMIT = 0xFFFFFFFF
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS


class Instruction(NamedTuple):
    """One ``struct sock_filter``."""

    code: int
    jump_true: int
    jump_false: int
    k: int


Program = tuple[Instruction, ...]
DROP_ALL: Program = (Instruction(RETURN, 0, 0, 0),)


class Test(NamedTuple):
    """``admit`` or drop what comes from one of ``networks``; look further at the rest."""

    networks: Sequence[Network]
    admit: bool


def guard(route: Route, around: Surroundings, family: Family) -> Program | None:
    """Return the filter that drops what the route drops; None where it would be too long.

    The order is that of ``listeners.action_for``: allowed sources, then node, pod, outside.
    """
    tests = origin_tests(route, around, family)
    outside = not isinstance(route.from_outside, Drop)
    if route.allowed_sources is None:
        return assembled(tests, outside, family)
    allowed = tuple(assembled(tests, outside, family) or ())
    if not allowed:
        return None
    return assembled([], False, family, first=route.allowed_sources, then=allowed)


def origin_tests(route: Route, around: Surroundings, family: Family) -> list[Test]:
    node = [ip_network(ip) for ip in sorted(around.node_ips)]
    node += around.loopback
    return [
        Test([n for n in node if n.version == family], not isinstance(route.from_node, Drop)),
        Test([n for n in around.pods if n.version == family], not isinstance(route.from_pod, Drop)),
    ]


def assembled(
    tests: Sequence[Test],
    otherwise: bool,
    family: Family,
    *,
    first: Sequence[Network] = (),
    then: Program = (),
) -> Program | None:
    """Return a program of the tests in order; sources in ``first`` go on to ``then`` instead."""
    program: list[Instruction] = []
    for test in tests:
        verdict = Instruction(RETURN, 0, 0, ADMIT if test.admit else 0)
        program += matched(collapsed(test.networks), (verdict,), family)
    program += matched(collapsed(first), then, family)
    program.append(Instruction(RETURN, 0, 0, ADMIT if otherwise else 0))
    return tuple(program) if len(program) <= MAX_INSTRUCTIONS else None


def matched(networks: Sequence[Network], then: Program, family: Family) -> list[Instruction]:
    """Return code that runs ``then``, which ends the program, for a source in ``networks``."""
    if not networks:
        return []
    program: list[Instruction] = []
    blocks = [comparison(network, family) for network in networks]
    sizes = [len(block) + 1 for block in blocks]
    for index, block in enumerate(blocks):
        program += block
        beyond = sum(sizes[index + 1 :]) + 1  # over the other networks and the jump after them
        program.append(Instruction(JUMP, 0, 0, beyond))
    program.append(Instruction(JUMP, 0, 0, len(then)))
    return program + list(then)


def comparison(network: Network, family: Family) -> list[Instruction]:
    """Return code that goes on at its end for a source in ``network``, else one further."""
    words: list[list[Instruction]] = []
    mask, base = int(network.netmask), int(network.network_address)
    count = 1 if family == 4 else 4
    for index in range(count):
        shift = 32 * (count - 1 - index)
        word_mask, word = mask >> shift & 0xFFFFFFFF, base >> shift & 0xFFFFFFFF
        if not word_mask:
            break
        load = Instruction(LOAD_WORD, 0, 0, NETWORK_HEADER + SOURCE_AT[family] + 4 * index)
        code = [load]
        if word_mask != 0xFFFFFFFF:
            code.append(Instruction(AND, 0, 0, word_mask))
        code.append(Instruction(JUMP_IF_EQUAL, 0, 0, word))
        words.append(code)
    total = sum(map(len, words))
    program: list[Instruction] = []
    for code in words:
        program += code[:-1]
        to_miss = total - len(program)  # from after the comparison to past the jump that follows
        program.append(code[-1]._replace(jump_false=to_miss))
    return program


def collapsed(networks: Iterable[Network]) -> list[Network]:
    """Return the fewest networks that cover the same addresses; all of one family."""
    return list(collapse_addresses(networks))  # type: ignore[type-var]  # a union is no TypeVar

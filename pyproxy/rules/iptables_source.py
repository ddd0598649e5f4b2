"""What makes a rule match its share of the clients, by their addresses: match ``bpf``.

No match of iptables hashes an address for any number of shares. ``cluster`` has at most 32, and
target HMARK overwrites the whole mark. A classic BPF program does: the address is multiplied by
the golden ratio, which spreads neighbours evenly over 32 bits, and a rule matches below its bound.
"""

from functools import lru_cache

from pyproxy.model import Family
from pyproxy.rules.guard import LOAD_WORD, NETWORK_HEADER, RETURN, SOURCE_AT, Instruction

SPAN = 1 << 32  # of a hash
GOLDEN = 0x9E3779B1  # a prime near SPAN divided by the golden ratio
XOR_VALUE, XOR_X, MULTIPLY, TO_X, JUMP_IF_NOT_BELOW = 0xA4, 0xAC, 0x24, 0x07, 0x35
WORDS: dict[Family, int] = {4: 1, 6: 4}


@lru_cache(maxsize=4096)
def source_below(bound: int, seed: int, family: Family) -> str:
    """Return the match for clients whose hash is less than ``bound``."""
    program = [
        *hashing(seed, family),
        Instruction(JUMP_IF_NOT_BELOW, 1, 0, bound),
        Instruction(RETURN, 0, 0, 0xFFFF),
        Instruction(RETURN, 0, 0, 0),
    ]
    text = ",".join(" ".join(map(str, instruction)) for instruction in program)
    return f'-m bpf --bytecode "{len(program)},{text}" '


def hashing(seed: int, family: Family) -> list[Instruction]:
    """Return what puts the hash of the source address into the accumulator, word by word."""
    start = NETWORK_HEADER + SOURCE_AT[family]
    program = [Instruction(LOAD_WORD, 0, 0, start), Instruction(XOR_VALUE, 0, 0, seed)]
    for word in range(1, WORDS[family]):
        program += [
            Instruction(MULTIPLY, 0, 0, GOLDEN),
            Instruction(TO_X, 0, 0, 0),
            Instruction(LOAD_WORD, 0, 0, start + 4 * word),
            Instruction(XOR_X, 0, 0, 0),
        ]
    return [*program, Instruction(MULTIPLY, 0, 0, GOLDEN)]

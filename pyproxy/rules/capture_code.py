"""The program at the kernel's socket lookup that gives packets for Services to our sockets.

It runs once for each new connection, and for each datagram that no connected socket waits for.
Linux: Documentation/bpf/prog_sk_lookup.rst. ``outcome`` in the tests says the same in Python.
"""

from typing import NamedTuple

from pyproxy.model import Family
from pyproxy.rules.capture import COUNTED, ORIGINS, PROTOCOLS, STANDINGS, VERDICTS
from pyproxy.rules.ebpf import FP, R0, R1, R2, R3, R6, R7, R8, R9, Assembler

MAP_LOOKUP, SK_RELEASE, SK_ASSIGN = 1, 86, 124  # helper functions
# Of SK_ASSIGN: replace what an earlier program chose, such as that of our predecessor; and take
# this very socket, also where others share its address.
REPLACE, NO_REUSEPORT = 1, 2
SK_DROP, SK_PASS = 0, 1
ADDRESS_FAMILY = {4: 2, 6: 10}

# struct bpf_sk_lookup: the offsets of its fields
FAMILY, PROTOCOL, REMOTE_IP4, REMOTE_IP6, REMOTE_PORT = 8, 12, 16, 20, 36
LOCAL_IP4, LOCAL_IP6, LOCAL_PORT = 40, 44, 60

# In the map of sockets; one of UDP comes after that of TCP. More workers come after the first.
SILENT_TCP, SILENT_UDP, SERVING_TCP, SERVING_UDP = range(4)
PAIR = 2

# Spreads addresses and ports that are near one another: 2^32 / golden ratio, halved to be positive.
SPREAD = 0x4F1BBCDD

# On the stack
KEY, NETWORK, INDEX = -24, -48, -56


class Maps(NamedTuple):
    """The file descriptors of the maps."""

    entries: int  # of frontends and addresses
    networks: int  # origins, and the sources that frontends allow
    sockets: int


def code(family: Family, maps: Maps, workers: int = 1) -> bytes:
    """Return the program of one family, for so many pairs of serving sockets."""
    asm = Assembler()
    asm.set(R6, R1)
    asm.load(R2, R6, FAMILY, 4)
    asm.jump_if(R2, "!=", ADDRESS_FAMILY[family], "pass")
    find_entry(asm, family, maps)
    decide(asm, family, maps)
    give(asm, family, maps, workers)
    asm.label("pass")
    asm.exit(SK_PASS)
    return asm.code()


def find_entry(asm: Assembler, family: Family, maps: Maps) -> None:
    """Leave the frontend's entry in R7; go on at ``silent`` or ``pass`` where there is none."""
    words = word_count(family)
    local = LOCAL_IP4 if family == 4 else LOCAL_IP6
    port = KEY + 4 * words
    copy(asm, KEY, [local + 4 * word for word in range(words)])
    copy(asm, port, [LOCAL_PORT, PROTOCOL])
    look_up(asm, maps.entries, KEY)
    asm.jump_if(R0, "!=", 0, "found")
    asm.store(FP, port, 0, 4)
    asm.store(FP, port + 4, 0, 4)
    look_up(asm, maps.entries, KEY)
    asm.jump_if(R0, "==", 0, "pass")
    asm.load(R3, R0, 0, 1)
    asm.jump_if(R3, "==", STANDINGS["silent"], "silent")
    for word in range(words):  # node ports are kept without an address
        asm.store(FP, KEY + 4 * word, 0, 4)
    copy(asm, port, [LOCAL_PORT, PROTOCOL])
    look_up(asm, maps.entries, KEY)
    asm.jump_if(R0, "==", 0, "pass")
    asm.label("found")
    asm.set(R7, R0)


def decide(asm: Assembler, family: Family, maps: Maps) -> None:
    """Go on at ``serve``, ``silent`` or ``pass``, or end with a refusal."""
    words = word_count(family)
    remote = REMOTE_IP4 if family == 4 else REMOTE_IP6
    addresses = [remote + 4 * word for word in range(words)]
    asm.store(FP, NETWORK, 32 + 32 * words, 4)
    copy(asm, NETWORK + 8, addresses)
    asm.store(FP, NETWORK + 4, 0, 4)
    look_up(asm, maps.networks, NETWORK)
    asm.set(R8, ORIGINS["outside"])
    asm.jump_if(R0, "==", 0, "origin")
    asm.load(R8, R0, 0, 4)
    asm.compute(R8, "&", 3)  # tells the verifier that it stays inside the entry
    asm.label("origin")
    asm.set(R2, R7)
    asm.compute(R2, "+", R8)
    asm.load(R9, R2, 0, 1)
    asm.jump_if(R9, "==", VERDICTS["pass"], "pass")  # whatever the allowed sources are
    asm.load(R8, R7, 4, 4)
    asm.jump_if(R8, "==", 0, "allowed")
    asm.store(FP, NETWORK + 4, R8, 4)
    look_up(asm, maps.networks, NETWORK)
    asm.jump_if(R0, "==", 0, "denied")
    asm.label("allowed")
    asm.jump_if(R9, "==", VERDICTS["serve"], "serve")
    asm.jump_if(R9, "==", VERDICTS["silent"], "dropped")
    count(asm, "rejected")
    asm.exit(SK_DROP)
    asm.label("denied")
    count(asm, "denied")
    asm.jump("silent")
    asm.label("dropped")
    count(asm, "dropped")


def count(asm: Assembler, what: str) -> None:
    """Count one more in the frontend's entry, to which R7 points."""
    asm.set(R1, 1)
    asm.add(R7, COUNTED[what], R1)


def give(asm: Assembler, family: Family, maps: Maps, workers: int) -> None:
    """Assign the socket that serves, or the one that is silent."""
    asm.label("silent")
    asm.set(R9, SILENT_TCP)
    asm.jump("protocol")
    asm.label("serve")
    asm.set(R9, SERVING_TCP)
    if workers > 1:
        choose_worker(asm, family, workers)
    asm.label("protocol")
    asm.load(R3, R6, PROTOCOL, 4)
    asm.jump_if(R3, "==", PROTOCOLS["TCP"], "chosen")
    asm.compute(R9, "+", 1)
    asm.label("chosen")
    asm.store(FP, INDEX, R9, 4)
    look_up(asm, maps.sockets, INDEX)
    asm.jump_if(R0, "==", 0, "pass")
    asm.set(R7, R0)
    asm.set(R1, R6)
    asm.set(R2, R7)
    asm.set(R3, REPLACE | NO_REUSEPORT)
    asm.call(SK_ASSIGN)
    asm.set(R1, R7)
    asm.call(SK_RELEASE)


def choose_worker(asm: Assembler, family: Family, workers: int) -> None:
    """Add to R9 where the worker's sockets are: by the client's address, mostly with its port.

    Datagrams of one client must all find the same worker, and so must all that a client with
    session affinity sends. R7 is the frontend's entry.
    """
    remote = REMOTE_IP4 if family == 4 else REMOTE_IP6
    asm.load(R8, R6, remote, 4)
    for word in range(1, word_count(family)):
        asm.load(R3, R6, remote + 4 * word, 4)
        asm.compute(R8, "*", SPREAD)
        asm.compute(R8, "^", R3)
    asm.load(R3, R7, 3, 1)
    asm.jump_if(R3, "!=", 0, "client known")
    asm.load(R3, R6, REMOTE_PORT, 4)
    asm.compute(R8, "*", SPREAD)
    asm.compute(R8, "^", R3)
    asm.label("client known")
    asm.compute(R8, "*", SPREAD)
    asm.compute(R8, ">>", 33)
    asm.compute(R8, "%", workers)
    asm.compute(R8, "*", PAIR)
    asm.compute(R9, "+", R8)


def word_count(family: Family) -> int:
    return 1 if family == 4 else 4


def copy(asm: Assembler, to: int, fields: list[int]) -> None:
    """Put fields of the context onto the stack, one after the other."""
    for index, field in enumerate(fields):
        asm.load(R3, R6, field, 4)
        asm.store(FP, to + 4 * index, R3, 4)


def look_up(asm: Assembler, map_fd: int, key: int) -> None:
    """Leave a pointer to the value in R0, or zero. R1 to R5 are lost."""
    asm.map(R1, map_fd)
    asm.set(R2, FP)
    asm.compute(R2, "+", key)
    asm.call(MAP_LOOKUP)

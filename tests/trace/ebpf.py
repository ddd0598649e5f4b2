"""Runs eBPF programs as the kernel would, on maps that are dictionaries."""

import operator

from pyproxy.rules.capture import NUMBER
from pyproxy.rules.ebpf import (
    ADD_AND_FETCH,
    ALU64,
    ATOMIC,
    CALL,
    CONDITIONS,
    EXIT,
    FROM_REGISTER,
    JUMP,
    JUMP32,
    LOAD,
    LOAD_WIDE,
    OPERATORS,
    SIZES,
    STORE,
    STORE_VALUE,
)

MASK = (1 << 64) - 1
LOADS, STORES, VALUES = (
    {kind | bits: size for size, bits in SIZES.items()} for kind in (LOAD, STORE, STORE_VALUE)
)
ADDITIONS = {ATOMIC | bits: size for size, bits in SIZES.items()}
STACK = 512
FUNCTIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
    "|": operator.or_, "&": operator.and_, "<<": operator.lshift, ">>": operator.rshift,
    "%": operator.mod, "^": operator.xor,
}  # fmt: skip
COMPARISONS = {
    "==": operator.eq, "!=": operator.ne, ">": operator.gt, ">=": operator.ge,
    "<": operator.lt, "<=": operator.le, "&": operator.and_,
}  # fmt: skip
COMPUTE = {bits: FUNCTIONS[name] for name, bits in OPERATORS.items() if name in FUNCTIONS}
COMPARE = {bits: COMPARISONS[name] for name, bits in CONDITIONS.items()}


class Pointer:
    """A place in some memory."""

    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at

    def moved(self, count):
        signed = count - (1 << 64) if count >> 63 else count
        return Pointer(self.memory, self.at + signed)

    def bytes(self, offset, size):
        start = self.at + offset
        assert 0 <= start <= len(self.memory) - size, "outside of what the program may touch"
        return slice(start, start + size)

    def read(self, offset, size):
        return int.from_bytes(self.memory[self.bytes(offset, size)], "little")

    def write(self, offset, size, value):
        where = self.bytes(offset, size)
        self.memory[where] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


class Hash(dict):
    """A hash map; ``find`` takes a key of the right size from memory."""

    def __init__(self, key_size):
        super().__init__()
        self.key_size = key_size

    def find(self, key):
        return self.get(key)


class Trie(Hash):
    """A map of prefixes: of those that match, the longest counts."""

    def find(self, key):
        bits = 8 * (len(key) - 4)
        wanted = int.from_bytes(key[4:], "big")
        best = -1, None
        for prefix, value in self.items():
            (length,) = NUMBER.unpack_from(prefix)
            if not (wanted ^ int.from_bytes(prefix[4:], "big")) >> (bits - length):
                best = max(best, (length, value))
        return best[1]


def run(code, context, maps, helpers):  # noqa: C901 - one branch for each kind of instruction
    """Return the program's result; ``helpers`` have numbers, and get the five arguments."""
    start = context if isinstance(context, Pointer) else Pointer(context)
    registers = [None, start, *[None] * 8, Pointer(bytearray(STACK), STACK)]
    at = 0
    while True:
        operation, pair, offset, value = (
            code[at],
            code[at + 1],
            int.from_bytes(code[at + 2 : at + 4], "little", signed=True),
            int.from_bytes(code[at + 4 : at + 8], "little", signed=True),
        )
        to, source = pair & 15, pair >> 4
        at += 8
        operand = registers[source] if operation & FROM_REGISTER else value & MASK
        if operation == EXIT:
            return registers[0]
        if operation == CALL:
            registers[0] = helpers[value](*registers[1:6])
            registers[1:6] = [None] * 5
        elif operation == LOAD_WIDE:
            registers[to] = maps[value]
            at += 8
        elif operation in LOADS:
            registers[to] = registers[source].read(offset, LOADS[operation])
        elif operation in STORES:
            registers[to].write(offset, STORES[operation], registers[source])
        elif operation in ADDITIONS:
            before = registers[to].read(offset, ADDITIONS[operation])
            registers[to].write(offset, ADDITIONS[operation], before + registers[source])
            if value & ADD_AND_FETCH:
                registers[source] = before
        elif operation in VALUES:
            registers[to].write(offset, VALUES[operation], value)
        elif operation & 7 == ALU64:
            registers[to] = computed(operation & 0xF0, registers[to], operand)
        elif operation & 7 == JUMP32:
            words = registers[to] & 0xFFFFFFFF, operand & 0xFFFFFFFF
            at += 8 * offset * taken(operation & 0xF0, *words)
        else:
            assert operation & 7 == JUMP, f"unknown operation {operation:#x}"
            at += 8 * offset * taken(operation & 0xF0, registers[to], operand)


def computed(operation, before, operand):
    if operation == OPERATORS["="]:
        return operand
    if isinstance(before, Pointer):
        assert operation == OPERATORS["+"], "only this is done to pointers"
        return before.moved(operand)
    return COMPUTE[operation](before, operand) & MASK


def taken(condition, value, operand):
    if condition == 0:  # none
        return True
    if isinstance(value, Pointer):  # which is compared with zero only
        return condition == CONDITIONS["!="]
    return bool(COMPARE[condition](value, operand))


def look_up(found, key, *_):
    """The helper that finds a value in a map: a pointer to it, or zero."""
    value = found.find(bytes(key.memory[key.bytes(0, found.key_size)]))
    return 0 if value is None else Pointer(value)

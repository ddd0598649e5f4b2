"""An assembler for eBPF programs: instructions and labels in, the kernel's bytes out. No I/O.

The instruction set is RFC 9669; helper functions have the numbers of ``linux/bpf.h``.
"""

import struct
import sys
from collections.abc import Mapping
from typing import Literal, NamedTuple


class Register(int):
    """A register. A plain number is a value."""


R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = map(Register, range(11))

Size = Literal[1, 2, 4, 8]
Operator = Literal["+", "-", "*", "/", "|", "&", "<<", ">>", "%", "^", "="]
Condition = Literal["==", ">", ">=", "&", "!=", "<", "<="]  # unsigned; "&": any bit in common

SIZES: Mapping[int, int] = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
OPERATORS: Mapping[Operator, int] = {
    "+": 0x00, "-": 0x10, "*": 0x20, "/": 0x30, "|": 0x40, "&": 0x50,
    "<<": 0x60, ">>": 0x70, "%": 0x90, "^": 0xA0, "=": 0xB0,
}  # fmt: skip
CONDITIONS: Mapping[Condition, int] = {
    "==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "<": 0xA0, "<=": 0xB0,
}  # fmt: skip
LOAD, STORE_VALUE, STORE, JUMP, JUMP32, ALU64 = 0x61, 0x62, 0x63, 0x05, 0x06, 0x07
ATOMIC = 0xC3
FROM_REGISTER = 0x08
LOAD_WIDE = 0x18
MAP_FD = 1  # as source register of LOAD_WIDE: the value is a map's file descriptor
CALL, EXIT = 0x85, 0x95
ADD_AND_FETCH = 0x01


class Instruction(NamedTuple):
    """One slot of eight bytes. ``label`` is where it jumps, until the program is complete."""

    code: int
    to: int = 0
    source: int = 0
    offset: int = 0
    value: int = 0
    label: str | None = None

    def packed(self, offset: int) -> bytes:
        low, high = self.to, self.source
        registers = high << 4 | low if sys.byteorder == "little" else low << 4 | high
        return struct.pack("=BBhI", self.code, registers, offset, self.value & 0xFFFFFFFF)


class Assembler:
    """A program under construction; ``code`` returns it.

    An operand is a register or a number; offsets are in bytes.
    """

    def __init__(self) -> None:
        self._steps: list[Instruction] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """Name the place of the next instruction. Raises ``ValueError`` for a name in use."""
        if name in self._labels:
            raise ValueError(f"label {name} exists twice")
        self._labels[name] = len(self._steps)

    def set(self, to: Register, operand: Register | int) -> None:
        self.compute(to, "=", operand)

    def compute(self, to: Register, operator: Operator, operand: Register | int) -> None:
        """``to = to operator operand``, in 64 bits; a plain number is sign-extended from 32."""
        self._operate(ALU64 | OPERATORS[operator], to, operand)

    def load(self, to: Register, base: Register, offset: int, size: Size = 8) -> None:
        """``to = *(base + offset)``, zero-extended."""
        self._add(LOAD | SIZES[size], to, base, offset)

    def store(self, base: Register, offset: int, operand: Register | int, size: Size = 8) -> None:
        """``*(base + offset) = operand``"""
        if isinstance(operand, Register):
            self._add(STORE | SIZES[size], base, operand, offset)
        else:
            self._add(STORE_VALUE | SIZES[size], base, 0, offset, operand)

    def add(self, base: Register, offset: int, register: Register, size: Size = 8) -> None:
        """Add to memory atomically; on any kernel, unlike ``fetch_and_add`` (5.12)."""
        self._add(ATOMIC | SIZES[size], base, register, offset)

    def fetch_and_add(
        self, base: Register, offset: int, register: Register, size: Size = 8
    ) -> None:
        """Add to memory atomically; the register then has what was there before."""
        self._add(ATOMIC | SIZES[size], base, register, offset, ADD_AND_FETCH)

    def map(self, to: Register, fd: int) -> None:
        """Let a register point to a map."""
        self._add(LOAD_WIDE, to, MAP_FD, 0, fd)
        self._add(0)

    def call(self, helper: int) -> None:
        """Call a helper function: arguments in R1 to R5, which are lost; the result in R0."""
        self._add(CALL, value=helper)

    def jump(self, label: str) -> None:
        self._add(JUMP, label=label)

    def jump_if(
        self,
        register: Register,
        condition: Condition,
        operand: Register | int,
        label: str,
        *,
        bits: int = 64,
    ) -> None:
        """Go to a later place if ``register condition operand``."""
        code = (JUMP if bits == 64 else JUMP32) | CONDITIONS[condition]
        self._operate(code, register, operand, label)

    def exit(self, result: int | None = None) -> None:
        """End the program; ``result`` is put into R0 first."""
        if result is not None:
            self.set(R0, result)
        self._add(EXIT)

    def code(self) -> bytes:
        """Return the program. Raises ``KeyError`` for a label that is nowhere."""
        return b"".join(
            step.packed(step.offset if step.label is None else self._labels[step.label] - at - 1)
            for at, step in enumerate(self._steps)
        )

    def _operate(
        self, code: int, to: Register, operand: Register | int, label: str | None = None
    ) -> None:
        if isinstance(operand, Register):
            self._add(code | FROM_REGISTER, to, operand, label=label)
        else:
            self._add(code, to, value=operand, label=label)

    def _add(
        self,
        code: int,
        to: int = 0,
        source: int = 0,
        offset: int = 0,
        value: int = 0,
        *,
        label: str | None = None,
    ) -> None:
        self._steps.append(Instruction(code, to, int(source), offset, value, label))

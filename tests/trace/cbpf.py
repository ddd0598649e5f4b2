"""Runs programs of classic BPF, as the kernel would: socket filters, and matches of iptables."""

from ipaddress import ip_address

from pyproxy.rules.guard import NETWORK_HEADER, SOURCE_AT, Instruction, Program


def program_of(bytecode: str) -> Program:
    """Return the program that match ``bpf`` has as its argument."""
    _, *found = bytecode.split(",")
    return tuple(Instruction(*map(int, text.split())) for text in found)


COMPUTED = {
    0x54: lambda a, x, k: a & k,
    0xA4: lambda a, x, k: a ^ k,
    0xAC: lambda a, x, k: a ^ x,
    0x24: lambda a, x, k: a * k & 0xFFFFFFFF,
}
TAKEN = {
    0x15: lambda a, k: a == k,
    0x35: lambda a, k: a >= k,
}


def verdict(program: Program, source: str) -> bool:
    """Run a program for a packet from ``source``, as the kernel would: True admits it."""
    address = ip_address(source)
    packed = address.packed
    start = SOURCE_AT[4 if address.version == 4 else 6]
    accumulator, x, at = 0, 0, 0
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        match code:
            case 0x20:
                offset = k - NETWORK_HEADER - start
                accumulator = int.from_bytes(packed[offset : offset + 4], "big")
            case 0x07:
                x = accumulator
            case 0x06:
                return k != 0
            case 0x05:
                at += k
            case _ if code in COMPUTED:
                accumulator = COMPUTED[code](accumulator, x, k)
            case _:
                at += jump_true if TAKEN[code](accumulator, k) else jump_false

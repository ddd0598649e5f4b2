"""Runs the socket filters of the userspace mode, as the kernel would."""

from ipaddress import ip_address

from pyproxy.rules.guard import NETWORK_HEADER, SOURCE_AT, Program


def verdict(program: Program, source: str) -> bool:
    """Run a program for a packet from ``source``, as the kernel would: True admits it."""
    address = ip_address(source)
    packed = address.packed
    start = SOURCE_AT[4 if address.version == 4 else 6]
    accumulator, at = 0, 0
    while True:
        code, jump_true, jump_false, k = program[at]
        at += 1
        match code:
            case 0x20:
                offset = k - NETWORK_HEADER - start
                accumulator = int.from_bytes(packed[offset : offset + 4], "big")
            case 0x54:
                accumulator &= k
            case 0x05:
                at += k
            case 0x15:
                at += jump_true if accumulator == k else jump_false
            case _:
                return k != 0

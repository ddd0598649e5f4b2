"""The socket load balancer's programs, as bytes: what runs at connect time and around datagrams.

They are attached to a cgroup and see each ``connect``, and each datagram that a socket without a
peer sends or receives. One that is for a Service's address goes to a backend instead; to the
socket's owner it still looks like the Service. Linux: struct bpf_sock_addr in linux/bpf.h.
"""

import sys
from collections.abc import Mapping
from typing import Literal, NamedTuple

from pyproxy.model import Family
from pyproxy.rules.ebpf import FP, R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, Assembler, Register
from pyproxy.rules.socketlb import AT_NODE, NODE, POD, REFUSE, SERVING

Event = Literal["connect", "sendmsg", "recvmsg", "getpeername"]


class Hook(NamedTuple):
    """Where a program is attached: the event, and the family that the socket speaks."""

    event: Event
    family: Family

    def __str__(self) -> str:
        return f"{self.event}{self.family}"


# Sockets of IPv6 may speak to IPv4 addresses. What they send then is an event of IPv4; the other
# events are of IPv6.
HOOKS: Mapping[Family, tuple[Hook, ...]] = {
    4: (
        Hook("connect", 4), Hook("sendmsg", 4), Hook("recvmsg", 4), Hook("getpeername", 4),
        Hook("connect", 6), Hook("recvmsg", 6), Hook("getpeername", 6),
    ),
    6: (Hook("connect", 6), Hook("sendmsg", 6), Hook("recvmsg", 6), Hook("getpeername", 6)),
}  # fmt: skip
ATTACH: Mapping[Hook, int] = {  # enum bpf_attach_type
    Hook("connect", 4): 10, Hook("connect", 6): 11,
    Hook("sendmsg", 4): 14, Hook("sendmsg", 6): 15,
    Hook("recvmsg", 4): 19, Hook("recvmsg", 6): 20,
    Hook("getpeername", 4): 29, Hook("getpeername", 6): 30,
}  # fmt: skip


class Fds(NamedTuple):
    """The maps' file descriptors.

    ``origins``: by the cookie of a network namespace, 0 for all others, whose its sockets are;
    ``addresses``: the node's, and which origins reach node ports there; ``reverse``: which address
    a socket's backend stands for; ``flows``: the backend of a socket without a peer for an
    address; ``affinity``: a namespace's backend of an owner, and when it was last given.
    """

    frontends: int
    slots: int
    members: int
    addresses: int
    origins: int
    reverse: int
    flows: int
    affinity: int


# Helper functions: enum bpf_func_id.
LOOKUP, UPDATE, KTIME, RANDOM, SOCKET_COOKIE, NETNS_COOKIE, SET_RETVAL = 1, 2, 5, 7, 46, 122, 187
FIND_TCP, FIND_UDP, RELEASE = 84, 85, 86
HERE = -1  # the network namespace of the socket
UDP = 17
REFUSED = -111  # ECONNREFUSED

# struct bpf_sock_addr, and of its socket (struct bpf_sock) the bound source address
IP4, IP6, PORT, PROTOCOL, SOCKET = 4, 8, 24, 36, 64
SOURCE_IP4, SOURCE_IP6 = 24, 28

# The values of maps; those of frontends are ``socketlb.FRONTEND``.
POD_SLOTS, NODE_SLOTS, POD_LIST, NODE_LIST, TURN, AFFINITY_NS, OWNER, AT_RANDOM = (
    0, 4, 8, 12, 16, 24, 32, 40,
)  # fmt: skip
BACKEND_SIZE, FLAG = 20, 18  # the flag: on this node
USED_AT = 24  # in the value of an affinity

# The stack. What stands side by side is a key together: slot and list, list and backend.
SLOT, KEY, BACKEND = -68, -64, -44
IS_LOCAL = -72  # whether the backend is on this node
KEY_PROTOCOL, KEY_LIST = KEY + 18, KEY + 19
FLOW, SERVICE = -104, -96  # the socket's cookie, and the address asked for
REVERSE, REVERSE_BACKEND = -136, -128  # the socket's cookie, and its backend
CLIENT, CLIENT_OWNER = -152, -144  # the namespace's cookie, and the Service port
REMEMBERED, REMEMBERED_AT = -184, -160  # the backend for an affinity, and now
NOBODY = ORIGIN = -192
TUPLE = -232


def program(hook: Hook, family: Family, maps: Fds, *, can_refuse: bool) -> bytes:
    """Return the program of a hook, for Services of a family.

    Without ``can_refuse`` (before Linux 5.18), what is to be refused goes on to the listeners.
    """
    asm = Assembler()
    asm.set(R6, R1)
    if hook.event in ("connect", "sendmsg"):
        find_frontend(asm, hook, maps)
        find_origin(asm, hook, maps)
        if hook.event == "sendmsg":
            follow_flow(asm, maps)
        follow_affinity(asm, maps)
        pick(asm, maps)
        remember(asm, hook, maps)
        avoid_hairpin(asm, family)
        note_reverse(asm, maps)
        write_address(asm, hook.family, BACKEND)
        asm.exit(1)
        asm.label("refuse")
        if can_refuse:
            asm.set(R1, REFUSED)
            asm.call(SET_RETVAL)
            asm.exit(0)
    else:
        restore(asm, hook, maps)
    asm.label("pass")
    asm.exit(1)
    return asm.code()


def find_frontend(asm: Assembler, hook: Hook, maps: Fds) -> None:
    """R7: the frontend; R9: the origins that may use it there."""
    read_address(asm, hook.family, KEY)
    asm.load(R2, R6, PROTOCOL, 4)
    asm.store(FP, KEY_PROTOCOL, R2, 1)
    asm.store(FP, KEY_LIST, 0, 1)
    look_up(asm, maps.frontends, KEY)
    asm.set(R9, POD | NODE)
    asm.jump_if(R0, "!=", 0, "frontend")
    look_up(asm, maps.addresses, KEY)
    asm.jump_if(R0, "==", 0, "pass")
    asm.load(R9, R0, 0, 4)
    for at in (KEY, KEY + 8):
        asm.store(FP, at, 0)
    asm.store(FP, KEY_LIST, AT_NODE, 1)
    look_up(asm, maps.frontends, KEY)
    asm.jump_if(R0, "==", 0, "pass")
    asm.label("frontend")
    asm.set(R7, R0)


def find_origin(asm: Assembler, hook: Hook, maps: Fds) -> None:
    """R8: the number of slots for this client; R9: the list they are of, also in the key.

    What is bound to a loopback address could not reach a backend from there.
    """
    leave_loopback(asm, hook.family)
    cookie(asm, NETNS_COOKIE, CLIENT)
    look_up(asm, maps.origins, CLIENT)
    asm.jump_if(R0, "!=", 0, "origin")
    asm.store(FP, NOBODY, 0)
    look_up(asm, maps.origins, NOBODY)
    asm.jump_if(R0, "==", 0, "pass")
    asm.label("origin")
    asm.load(R2, R0, 0, 4)
    asm.store(FP, ORIGIN, R2, 4)
    asm.compute(R9, "&", R2)
    asm.jump_if(R9, "==", 0, "pass")
    asm.load(R8, R7, POD_SLOTS, 4)
    asm.load(R9, R7, POD_LIST, 4)
    asm.jump_if(R2, "!=", NODE, "counted")
    asm.load(R8, R7, NODE_SLOTS, 4)
    asm.load(R9, R7, NODE_LIST, 4)
    asm.label("counted")
    asm.jump_if(R8, "==", 0, "pass")
    asm.jump_if(R8, "==", REFUSE, "refuse", bits=32)
    asm.store(FP, KEY_LIST, R9, 1)
    cookie(asm, SOCKET_COOKIE, FLOW)
    asm.store(FP, REVERSE, R0)
    read_address(asm, hook.family, SERVICE)
    asm.store(FP, SERVICE + BACKEND_SIZE, 0, 4)  # the key's end


def leave_loopback(asm: Assembler, family: Family) -> None:
    asm.load(R2, R6, SOCKET)
    asm.jump_if(R2, "==", 0, "pass")
    if family == 4:
        asm.load(R3, R2, SOURCE_IP4, 4)
        asm.store(FP, NOBODY, R3, 4)
        asm.load(R3, FP, NOBODY, 1)
        asm.jump_if(R3, "==", 127, "pass")
        return
    for at in (0, 4, 8):
        asm.load(R3, R2, SOURCE_IP6 + at, 4)
        asm.jump_if(R3, "!=", 0, "elsewhere")
    asm.load(R3, R2, SOURCE_IP6 + 12, 4)
    asm.jump_if(R3, "==", int.from_bytes(b"\0\0\0\1", sys.byteorder), "pass")
    asm.label("elsewhere")


def follow_flow(asm: Assembler, maps: Fds) -> None:
    """A socket that has sent to this address goes on with its backend, while that serves."""
    look_up(asm, maps.flows, FLOW)
    asm.jump_if(R0, "==", 0, "no flow")
    take(asm, R0)
    asm.store(FP, KEY_LIST, SERVING, 1)
    look_up(asm, maps.members, KEY)
    asm.jump_if(R0, "!=", 0, "known")
    asm.store(FP, KEY_LIST, R9, 1)
    asm.label("no flow")


def follow_affinity(asm: Assembler, maps: Fds) -> None:
    """A client that was given a backend lately is given it again, if it still is one."""
    asm.load(R2, R7, AFFINITY_NS)
    asm.jump_if(R2, "==", 0, "pick")
    asm.load(R2, R7, OWNER)
    asm.store(FP, CLIENT_OWNER, R2)
    look_up(asm, maps.affinity, CLIENT)
    asm.jump_if(R0, "==", 0, "pick")
    asm.set(R9, R0)
    asm.call(KTIME)
    asm.load(R2, R9, USED_AT)
    asm.compute(R0, "-", R2)
    asm.load(R2, R7, AFFINITY_NS)
    asm.jump_if(R0, ">=", R2, "pick")
    take(asm, R9)
    look_up(asm, maps.members, KEY)
    asm.jump_if(R0, "!=", 0, "chosen")


def pick(asm: Assembler, maps: Fds) -> None:
    """Take the backend of the next slot. A slot that has just gone is replaced by the first."""
    asm.label("pick")
    asm.load(R2, R7, AT_RANDOM, 4)
    asm.jump_if(R2, "!=", 0, "random")
    asm.set(R0, 1)
    asm.fetch_and_add(R7, TURN, R0)
    asm.jump("numbered")
    asm.label("random")
    asm.call(RANDOM)
    asm.label("numbered")
    asm.compute(R0, "%", R8)
    asm.store(FP, SLOT, R0, 4)
    look_up(asm, maps.slots, SLOT)
    asm.jump_if(R0, "!=", 0, "slot")
    asm.store(FP, SLOT, 0, 4)
    look_up(asm, maps.slots, SLOT)
    asm.jump_if(R0, "==", 0, "pass")
    asm.label("slot")
    take(asm, R0)


def remember(asm: Assembler, hook: Hook, maps: Fds) -> None:
    """Write down the backend of the client, and of the flow."""
    asm.label("chosen")
    asm.load(R2, FP, IS_LOCAL, 4)
    asm.store(FP, BACKEND + FLAG, R2, 2)
    asm.load(R2, R7, AFFINITY_NS)
    asm.jump_if(R2, "==", 0, "flow")
    asm.call(KTIME)
    asm.store(FP, REMEMBERED_AT, R0)
    copy(asm, FP, REMEMBERED, FP, BACKEND)
    asm.store(FP, REMEMBERED + BACKEND_SIZE, 0, 4)
    update(asm, maps.affinity, CLIENT, REMEMBERED)
    asm.label("flow")
    if hook.event == "sendmsg":
        update(asm, maps.flows, FLOW, BACKEND)
        asm.label("known")


def avoid_hairpin(asm: Assembler, family: Family) -> None:
    """Leave a pod that would be given itself to the listeners, which hide who it is, as kube-proxy.

    A pod's address is not known here. It may be its own backend if that is on this node, and a
    socket of the pod would take the connection.
    """
    asm.load(R2, FP, IS_LOCAL, 4)
    asm.jump_if(R2, "==", 0, "another")
    asm.load(R2, FP, ORIGIN, 4)
    asm.jump_if(R2, "!=", POD, "another")
    first = 12 if family == 4 else 0
    size = 16 - first
    for at in range(0, size, 4):
        asm.load(R2, FP, BACKEND + first + at, 4)
        asm.store(FP, TUPLE + at, R2, 4)
        asm.store(FP, TUPLE + size + at, R2, 4)
    asm.load(R2, FP, BACKEND + 16, 2)
    asm.store(FP, TUPLE + 2 * size, 0, 2)
    asm.store(FP, TUPLE + 2 * size + 2, R2, 2)
    asm.load(R9, FP, KEY_PROTOCOL, 1)
    asm.set(R1, R6)
    asm.set(R2, FP)
    asm.compute(R2, "+", TUPLE)
    asm.set(R3, 2 * size + 4)
    asm.set(R4, HERE)
    asm.set(R5, 0)
    asm.jump_if(R9, "==", UDP, "datagrams")
    asm.call(FIND_TCP)
    asm.jump("searched")
    asm.label("datagrams")
    asm.call(FIND_UDP)
    asm.label("searched")
    asm.jump_if(R0, "==", 0, "another")
    asm.set(R1, R0)
    asm.call(RELEASE)
    asm.jump("pass")
    asm.label("another")


def note_reverse(asm: Assembler, maps: Fds) -> None:
    """Write down which address the socket's owner believes in."""
    copy(asm, FP, REVERSE_BACKEND, FP, BACKEND)
    asm.store(FP, REVERSE_BACKEND + FLAG, 0, 2)
    asm.store(FP, REVERSE_BACKEND + BACKEND_SIZE, 0, 4)
    update(asm, maps.reverse, REVERSE, SERVICE)


def restore(asm: Assembler, hook: Hook, maps: Fds) -> None:
    """Show the Service's address in place of the backend's."""
    cookie(asm, SOCKET_COOKIE, REVERSE)
    read_address(asm, hook.family, REVERSE_BACKEND)
    asm.store(FP, REVERSE_BACKEND + BACKEND_SIZE, 0, 4)
    look_up(asm, maps.reverse, REVERSE)
    asm.jump_if(R0, "==", 0, "pass")
    copy(asm, FP, BACKEND, R0, 0)
    write_address(asm, hook.family, BACKEND)


# --- phrases --------------------------------------------------------------------------------------


def read_address(asm: Assembler, family: Family, to: int) -> None:
    """Put the address and port of the event on the stack: 20 bytes, as in ``socketlb.BACKEND``."""
    if family == 4:
        asm.store(FP, to, 0, 4)
        asm.store(FP, to + 4, 0, 4)
        asm.store(FP, to + 8, int.from_bytes(b"\0\0\xff\xff", sys.byteorder), 4)
        asm.load(R2, R6, IP4, 4)
        asm.store(FP, to + 12, R2, 4)
    else:
        for at in range(0, 16, 4):
            asm.load(R2, R6, IP6 + at, 4)
            asm.store(FP, to + at, R2, 4)
    asm.load(R2, R6, PORT, 4)
    asm.store(FP, to + 16, R2, 2)
    asm.store(FP, to + 18, 0, 2)


def write_address(asm: Assembler, family: Family, at: int) -> None:
    """Make 20 bytes of the stack the address and port of the event."""
    for word in range(12 if family == 4 else 0, 16, 4):
        asm.load(R2, FP, at + word, 4)
        asm.store(R6, IP4 if family == 4 else IP6 + word, R2, 4)
    asm.load(R2, FP, at + 16, 2)
    asm.store(R6, PORT, R2, 4)


def copy(asm: Assembler, to: Register, to_offset: int, base: Register, offset: int) -> None:
    for at in range(0, BACKEND_SIZE, 4):
        asm.load(R2, base, offset + at, 4)
        asm.store(to, to_offset + at, R2, 4)


def take(asm: Assembler, base: Register) -> None:
    """Take a map's value for the backend. Its flag is kept apart: it is no part of keys."""
    copy(asm, FP, BACKEND, base, 0)
    asm.load(R2, base, FLAG, 2)
    asm.store(FP, IS_LOCAL, R2, 4)
    asm.store(FP, BACKEND + FLAG, 0, 2)


def cookie(asm: Assembler, helper: int, to: int) -> None:
    """Put the cookie of the socket or its namespace on the stack; it is also in R0."""
    asm.set(R1, R6)
    asm.call(helper)
    asm.store(FP, to, R0)


def look_up(asm: Assembler, map_fd: int, key: int) -> None:
    """R0: the value, or 0."""
    asm.map(R1, map_fd)
    asm.set(R2, FP)
    asm.compute(R2, "+", key)
    asm.call(LOOKUP)


def update(asm: Assembler, map_fd: int, key: int, value: int) -> None:
    asm.map(R1, map_fd)
    asm.set(R2, FP)
    asm.compute(R2, "+", key)
    asm.set(R3, FP)
    asm.compute(R3, "+", value)
    asm.set(R4, 0)
    asm.call(UPDATE)

"""What the socket load balancer's maps contain for a frontend, and the order of changes. No I/O.

A frontend has numbered slots with backends, one after the other, and a program takes the next at
connect time. What these maps cannot say is left to the listeners: connections that find no
frontend here, or none for their origin, go on to the address they asked for.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Literal, NamedTuple

from msgspec import Struct, structs

from pyproxy.balancer import BY_CLIENT, BY_CONNECTIONS, turn_of
from pyproxy.model import Action, Address, Forward, Frontend, Pool, Proto, Reject, family_of
from pyproxy.rules.listeners import Listener
from pyproxy.rules.nft import packed_ip
from pyproxy.rules.slots import settled

Table = Literal["frontends", "slots", "members"]

POD, NODE = 1, 2  # origins, and bits for sets of them
REFUSE = 0xFFFFFFFF  # as the number of slots
AT_ADDRESS, AT_NODE = 0, 1  # kinds of frontend: node ports are kept without an address
FOR_PODS, FOR_NODE, SERVING = 0, 1, 2  # the lists of backends of a frontend
NUMBERS: Mapping[Proto, int] = {"TCP": 6, "UDP": 17}
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291, 2.5.5.2: IPv4 addresses are kept like this
PRESENT = bytes(4)

KEY = struct.Struct("=16s2sBB")  # address, port, protocol, kind or list
BACKEND = struct.Struct("=16s2sH")  # address, port, whether on this node; zero in keys
SLOT = struct.Struct("=I20s")  # number, key of the list
MEMBER = struct.Struct("=20s20s")  # key of the list, backend
# slots and list for pods, then for the node; turn; affinity in ns; owner; random or in turn
FRONTEND = struct.Struct("=IIIIQQ8sII")


class Write(NamedTuple):
    """One change of a map; without a value the element goes."""

    table: Table
    key: bytes
    value: bytes | None


class Content(Struct, frozen=True):
    """What the maps have of one frontend."""

    key: bytes
    value: bytes
    slots: Mapping[bytes, bytes]
    members: frozenset[bytes]


def content(
    frontend: Frontend, listener: Listener, before: Content | None, start: int
) -> Content | None:
    """Return what a frontend has in the maps; None if the listeners serve it alone.

    ``start`` is where its turn begins. Backends keep the slots they had in ``before``.
    """
    route = listener.route
    if route.allowed_sources is not None or frontend.proto not in NUMBERS:
        return None
    from_pod, from_node = pool_for_pods(route.from_pod), pool_of(route.from_node)
    pools = [pool for pool in (from_pod, from_node) if pool is not None]
    if any(pool.scheduler in BY_CONNECTIONS | BY_CLIENT for pool in pools):
        return None
    node_list = FOR_PODS if from_node == from_pod else FOR_NODE
    old = before.slots if before is not None else {}
    slots: dict[bytes, bytes] = {}
    members: set[bytes] = set()
    sizes = {FOR_PODS: 0, node_list: 0}
    for number, pool in {FOR_PODS: from_pod, node_list: from_node}.items():
        if pool is not None:
            found = numbered(list_key(frontend, number), pool, old)
            slots |= found
            sizes[number] = len(found)
            if pool.affinity_seconds is not None:
                members |= memberships(frontend, number, (b.address for b in pool.backends))
    if frontend.proto == "UDP":
        members |= memberships(frontend, SERVING, listener.serving)
    counts = (
        slot_count(route.from_pod, sizes[FOR_PODS]),
        slot_count(route.from_node, sizes[node_list]),
    )
    if counts == (0, 0):
        return None
    affinity = next((p.affinity_seconds for p in pools if p.affinity_seconds is not None), 0)
    at_random = any(pool.scheduler == "random" for pool in pools)
    value = FRONTEND.pack(
        *counts, FOR_PODS, node_list, start, affinity * 10**9, owner_id(listener), at_random, 0
    )
    return Content(list_key(frontend, kind_of(frontend)), value, slots, frozenset(members))


def changes(old: Content | None, new: Content | None) -> Iterator[Write]:
    """Yield the writes that lead from one to the other, in an order that is right throughout.

    Whoever connects meanwhile is given a backend of before or one of after: slots are filled
    before they are counted, and emptied when they are counted no more.
    """
    if old is not None and new is not None and shares_list(old) != shares_list(new):
        # Slots that both origins use would be one origin's before the other knows: meanwhile the
        # listeners serve.
        yield Write("frontends", old.key, None)
        old = structs.replace(old, value=b"")
    old_slots = old.slots if old is not None else {}
    old_members = old.members if old is not None else frozenset()
    if new is not None:
        yield from (Write("members", key, PRESENT) for key in new.members - old_members)
        for key, backend in new.slots.items():
            if old_slots.get(key) != backend:
                yield Write("slots", key, backend)
    if old is not None and old.value and (new is None or new.key != old.key):
        yield Write("frontends", old.key, None)
    if new is not None and (old is None or unturned(old.value) != unturned(new.value)):
        yield Write("frontends", new.key, new.value)
    new_slots = new.slots if new is not None else {}
    new_members = new.members if new is not None else frozenset()
    yield from (Write("slots", key, None) for key in old_slots if key not in new_slots)
    yield from (Write("members", key, None) for key in old_members - new_members)


def shares_list(held: Content) -> bool:
    """Say whether pods and the node are given backends of one list."""
    _pods, _node, for_pods, for_node, *_rest = FRONTEND.unpack(held.value)
    return bool(for_pods == for_node)


def unturned(value: bytes) -> bytes:
    """Return a frontend's value without where its turn is, which the programs move on."""
    return value[:16] + value[24:]


# --- the parts ------------------------------------------------------------------------------------


def pool_of(action: Action) -> Pool | None:
    return action.pool if isinstance(action, Forward) else None


def pool_for_pods(action: Action) -> Pool | None:
    """Return the pool, unless endpoints are to see the node: a pod's socket has its own address."""
    return None if isinstance(action, Forward) and action.masquerade else pool_of(action)


def slot_count(action: Action, size: int) -> int:
    """Return the number of slots; 0 leaves it to the listeners, which know how to be silent."""
    return REFUSE if isinstance(action, Reject) else size


def numbered(key: bytes, pool: Pool, old: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    here = {backend.address for backend in pool.backends if backend.is_local}
    wanted = [packed_address(address, is_local=address in here) for address in turn_of(pool)]
    slots = [SLOT.pack(number, key) for number in range(len(wanted))]
    return dict(zip(slots, settled(wanted, [old.get(slot) for slot in slots]), strict=True))


def memberships(frontend: Frontend, number: int, addresses: Iterable[Address]) -> set[bytes]:
    key = list_key(frontend, number)
    return {MEMBER.pack(key, packed_address(address)) for address in addresses}


def kind_of(frontend: Frontend) -> int:
    return AT_ADDRESS if frontend.ip else AT_NODE


def list_key(frontend: Frontend, last: int) -> bytes:
    ip = mapped_ip(frontend.ip) if frontend.ip else bytes(16)
    return KEY.pack(ip, frontend.port.to_bytes(2, "big"), NUMBERS[frontend.proto], last)


def packed_address(address: Address, *, is_local: bool = False) -> bytes:
    return BACKEND.pack(mapped_ip(address.ip), address.port.to_bytes(2, "big"), is_local)


def mapped_ip(ip: str) -> bytes:
    return MAPPED + packed_ip(ip) if family_of(ip) == 4 else packed_ip(ip)


def owner_id(listener: Listener) -> bytes:
    """Return what a client's affinity is kept by: the same after a restart, and for all addresses.

    Eight bytes of a hash: that two of 10,000 owners share one is 1 in 10^11.
    """
    return blake2b("\0".join(listener.owner).encode(), digest_size=8).digest()

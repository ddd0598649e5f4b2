"""The listeners of one owner as bytes, for another process of this version. No I/O.

Frontends of an owner share pools, and what is one value here is one value there.
"""

from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Final

from msgspec import Struct, msgpack

from pyproxy.model import (
    Action,
    Address,
    Drop,
    Forward,
    Frontend,
    FrontendKind,
    Network,
    Pass,
    Pool,
    Reject,
    Route,
    ServicePortName,
)
from pyproxy.rules.listeners import Listener, Surroundings

REJECT, DROP, PASS = -1, -2, -3
WITHOUT_POOL: Final[Mapping[int, Action]] = {REJECT: Reject(), DROP: Drop(), PASS: Pass()}

PackedAction = tuple[int, bool]  # the number of its pool, or one of the numbers above; masquerade


class PackedRoute(Struct, frozen=True, array_like=True):
    """One frontend's part."""

    frontend: Frontend
    kind: FrontendKind
    actions: tuple[PackedAction, PackedAction, PackedAction]
    sources: tuple[str, ...] | None


class PackedOwner(Struct, frozen=True, array_like=True):
    """All listeners of an owner; without frontends, it has none."""

    owner: ServicePortName
    frontends: tuple[Frontend, ...]
    body: bytes  # a tenth of what it says takes up as values


class Body(Struct, frozen=True, array_like=True):
    """What stands behind the frontends."""

    serving: frozenset[Address]
    pools: tuple[Pool, ...]
    routes: tuple[PackedRoute, ...]


BODIES: Final = msgpack.Decoder(Body)


class PackedSurroundings(Struct, frozen=True, array_like=True):
    """``Surroundings``, its networks as text."""

    node_ips: frozenset[str]
    pods: tuple[str, ...]
    loopback: tuple[str, ...]


def packed_owner(owner: ServicePortName, listeners: Iterable[Listener]) -> PackedOwner:
    numbers: dict[int, int] = {}  # by identity: a pool is long to hash and to compare
    found: list[Pool] = []
    routes = []
    serving: frozenset[Address] = frozenset()
    for listener in listeners:
        serving, route = listener.serving, listener.route
        for action in actions_of(route):
            if isinstance(action, Forward) and id(action.pool) not in numbers:
                numbers[id(action.pool)] = len(found)
                found.append(action.pool)
        first, second, third = (packed_action(action, numbers) for action in actions_of(route))
        sources = route.allowed_sources
        texts = tuple(map(str, sources)) if sources is not None else None
        routes.append(PackedRoute(route.frontend, route.kind, (first, second, third), texts))
    body = msgpack.encode(Body(serving, tuple(found), tuple(routes)))
    return PackedOwner(owner, tuple(route.frontend for route in routes), body)


def packed_action(action: Action, numbers: Mapping[int, int]) -> PackedAction:
    match action:
        case Forward(pool=pool, masquerade=masquerade):
            return numbers[id(pool)], masquerade
        case Reject():
            return REJECT, False
        case Drop():
            return DROP, False
        case Pass():
            return PASS, False


def listeners_of(packed: PackedOwner) -> dict[Frontend, Listener]:
    body = BODIES.decode(packed.body)
    actions: dict[PackedAction, Action] = {}

    def action_of(one: PackedAction) -> Action:
        if one not in actions:
            number, masquerade = one
            plain = WITHOUT_POOL.get(number)
            actions[one] = plain or Forward(body.pools[number], masquerade)
        return actions[one]

    found = {}
    for one in body.routes:
        pod, node, outside = map(action_of, one.actions)
        sources = tuple(map(ip_network, one.sources)) if one.sources is not None else None
        route = Route(one.frontend, one.kind, pod, node, outside, sources)
        found[one.frontend] = Listener(packed.owner, route, body.serving)
    return found


def packed_surroundings(around: Surroundings) -> PackedSurroundings:
    pods, loopback = tuple(map(str, around.pods)), tuple(map(str, around.loopback))
    return PackedSurroundings(around.node_ips, pods, loopback)


def surroundings_of(packed: PackedSurroundings) -> Surroundings:
    return Surroundings(packed.node_ips, networks(packed.pods), networks(packed.loopback))


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    return tuple(map(ip_network, texts))


def actions_of(route: Route) -> tuple[Action, Action, Action]:
    return route.from_pod, route.from_node, route.from_outside

"""Endpoint selection: the hot path of the forwarder, once for every connection.

What can be computed when a pool changes is: weighted round robin is expanded into one full even
turn, and a pick is an index into it. Affinity remembers the backend's address, so that it
survives an update that keeps the backend. One writer: the event loop.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from itertools import cycle
from math import gcd
from zlib import crc32

from pyproxy.model import Address, Backend, Pool, Scheduler

LONGEST_TURN = 1024  # picks; weights that need more are rounded, but in large pools
SLOTS_EACH = 16  # for each backend of a large pool: so long may its turn be
MOST_CLIENTS = 65535  # that affinity remembers: as many as a set of mode nftables
NOBODY: frozenset[Address] = frozenset()
IN_TURN: frozenset[Scheduler | None] = frozenset({None, "rr", "wrr"})
# Schedulers that differ only in the kernel's virtual servers.
BY_CLIENT: frozenset[Scheduler | None] = frozenset({"sh", "dh", "mh"})
BY_CONNECTIONS: frozenset[Scheduler | None] = frozenset({"lc", "wlc", "sed", "nq"})


class Picker:
    """Gives the connections of one owner their backends.

    All pools of the owner share its affinity (kube-proxy: a client has one endpoint, whichever
    address of the Service it uses) and its connection counts.
    """

    __slots__ = ("_affinity", "_choose", "_is_full", "_on_full", "_open", "_turns", "counts")

    def __init__(
        self, choose: Callable[[int], int], on_full: Callable[[], None] = lambda: None
    ) -> None:
        """``choose(n)`` returns a random number below ``n``.

        ``on_full`` hears when clients begin to be forgotten before their time.
        """
        self._choose = choose
        self._on_full = on_full
        self._turns: dict[int, Turn] = {}  # by identity: a pool is long to hash and to compare
        # What each client was given, and until when: who was silent longest comes first.
        self._affinity: OrderedDict[str, tuple[Address, float]] = OrderedDict()
        self._is_full = False
        self._open: dict[Address, int] = {}
        self.counts = False  # a scheduler looks at how many connections there are

    def use(self, pools: Collection[Pool]) -> None:
        """Have turns for these pools, and forget all others.

        A pool that equals an old one goes on where that was. Most pools see no client for long:
        what a turn is is computed when the first comes.
        """
        old = list(self._turns.values())
        self._turns = {}
        for pool in pools:
            same = next((turn for turn in old if turn.pool == pool), None)
            self._turns[id(pool)] = same.of(pool) if same else Turn(pool)
        self.counts = any(pool.scheduler in BY_CONNECTIONS for pool in pools)

    def pick(
        self, pool: Pool, client: str, now: float, avoid: Collection[Address] = NOBODY
    ) -> Backend:
        """Return the backend for a connection of ``client``: one of the pool, which is in use.

        A backend in ``avoid`` did not answer: another is given while there is one, and the
        client's affinity moves to it.
        """
        turn = self._turns[id(pool)]
        if turn.is_plain and not avoid:
            return turn.next()
        if not turn.cycle:
            turn.begin(self._choose)
        seconds = pool.affinity_seconds
        if seconds is None:
            return self._scheduled(turn, client, avoid)
        known = self._affinity.get(client)
        backend = None
        if known is not None and now < known[1] and known[0] not in avoid:
            backend = turn.members.get(known[0])
        if backend is None:
            backend = self._scheduled(turn, client, avoid)
        self._affinity[client] = (backend.address, now + seconds)
        if known is not None:
            self._affinity.move_to_end(client)
        else:
            self._make_room(now)
        return backend

    def opened(self, backend: Address) -> None:
        """Count a connection that now exists; its end is to be told then, and only then."""
        self._open[backend] = self._open.get(backend, 0) + 1

    def closed(self, backend: Address) -> None:
        left = self._open.get(backend, 0) - 1
        if left > 0:
            self._open[backend] = left
        else:
            self._open.pop(backend, None)

    def _scheduled(self, turn: "Turn", client: str, avoid: Collection[Address]) -> Backend:
        scheduler = turn.scheduler
        if avoid:
            return turn.another(avoid)
        if scheduler == "random":
            return turn.cycle[self._choose(len(turn.cycle))]
        if scheduler in BY_CLIENT:
            return turn.cycle[crc32(client.encode()) % len(turn.cycle)]
        if scheduler in BY_CONNECTIONS:
            return self._least_connected(turn)
        return turn.next()

    def _least_connected(self, turn: "Turn") -> Backend:
        """Return the backend with the fewest connections for its weight.

        Among equals, the first from where the turn is.
        """
        count = self._open.get
        ring = turn.pool.backends
        start = ring.index(turn.next())
        ordered = ring[start:] + ring[:start]
        return min(ordered, key=lambda b: (count(b.address, 0) + 1) / b.weight)

    def _make_room(self, now: float) -> None:
        """Forget two clients whose time is over, for one that came; and one if it is too many."""
        clients = self._affinity
        for _ in range(2):
            oldest = next(iter(clients))
            if now < clients[oldest][1]:
                break
            del clients[oldest]
        if len(clients) > MOST_CLIENTS:
            clients.popitem(last=False)
            if not self._is_full:
                self._on_full()
            self._is_full = True
        elif len(clients) < MOST_CLIENTS * 3 // 4:
            self._is_full = False


class Turn:
    """One full cycle of a pool, and where it is. It has begun when somebody is given a backend."""

    __slots__ = ("cycle", "is_plain", "members", "next", "pool", "scheduler")

    next: Callable[[], Backend]

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.scheduler: Scheduler | None = pool.scheduler
        self.cycle: tuple[Backend, ...] = ()  # until it begins
        self.members: dict[Address, Backend] = {}
        self.is_plain = False  # it has begun, and a pick is but the next

    def begin(self, choose: Callable[[int], int]) -> None:
        self.members = {backend.address: backend for backend in self.pool.backends}
        self.cycle = tuple([self.members[address] for address in turn_of(self.pool)])
        self.is_plain = self.pool.affinity_seconds is None and self.scheduler in IN_TURN
        count = len(self.cycle)  # nodes must not all begin with the same backend
        start = choose(count) if count > 1 else 0
        self.next = cycle(self.cycle[start:] + self.cycle[:start]).__next__

    def of(self, pool: Pool) -> "Turn":
        """Return this turn as that of an equal pool."""
        self.pool = pool
        return self

    def another(self, avoid: Collection[Address]) -> Backend:
        """Return the next backend that is not in ``avoid``, or any if all are."""
        for _ in self.cycle:
            backend = self.next()
            if backend.address not in avoid:
                break
        return backend


def turn_of(pool: Pool, *, longest: int = LONGEST_TURN) -> tuple[Address, ...]:
    """Return one cycle of a pool: each backend as often as its share says, spread out."""
    counts = slot_counts(pool, longest=longest)
    addresses = tuple([b.address for b in pool.backends])
    if len(addresses) == sum(counts):
        return addresses
    return tuple([addresses[index] for index in spread(counts)])


def slot_counts(pool: Pool, *, longest: int = LONGEST_TURN) -> list[int]:
    """Return how often each backend is in a cycle, of ``longest`` or ``SLOTS_EACH`` a backend.

    Exact where that many are enough. Otherwise each has one at least, and of the share that it
    asked for it loses at most one part in ``SLOTS_EACH``, and one slot.
    """
    asked = proportions(pool)
    limit = max(longest, SLOTS_EACH * len(asked))
    return asked if sum(asked) <= limit else reduced(apportioned(asked, limit))


def proportions(pool: Pool) -> list[int]:
    """Return the smallest weights with which the backends have the shares asked for.

    ``rr`` gives every backend the same share, whatever its weight.
    """
    weights = [b.weight for b in pool.backends]
    if pool.scheduler == "rr" or weights.count(weights[0]) == len(weights):
        return [1] * len(weights)
    return reduced(weights)


def reduced(weights: list[int]) -> list[int]:
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def apportioned(weights: list[int], seats: int) -> list[int]:
    """Divide seats by weight: one for whoever would have less, the rest by largest remainder."""
    counts = [1] * len(weights)
    rest = sum(weights)
    ascending = sorted(range(len(weights)), key=weights.__getitem__)
    light = 0
    while weights[ascending[light]] * seats < rest:
        seats -= 1
        rest -= weights[ascending[light]]
        light += 1
    remainders = {}
    for index in ascending[light:]:
        counts[index], remainders[index] = divmod(weights[index] * seats, rest)
    left = seats - sum(counts[index] for index in remainders)
    for index in sorted(remainders, key=lambda index: (-remainders[index], index))[:left]:
        counts[index] += 1
    return counts


def spread(counts: list[int]) -> list[int]:
    """Return each index as often as its count, at even distances.

    Those with one count take turns at places as evenly spread as those of a single heavier one.
    """
    alike: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        alike.setdefault(count, []).append(index)
    places = []
    for count, members in alike.items():
        size = count * len(members)
        places += [((2 * nth + 1) / size, members[nth % len(members)]) for nth in range(size)]
    return [index for _, index in sorted(places)]

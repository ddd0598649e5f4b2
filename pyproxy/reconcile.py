"""Keep one target equal to the plan: the loop that every mode shares."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from pyproxy.cache import Owners
from pyproxy.counters import Entry, Reading
from pyproxy.delta import Delta, diff, merge
from pyproxy.model import Family, PortPlan, ServicePortName
from pyproxy.plan import Plan
from pyproxy.report import SyncReport, told

K = TypeVar("K")
V = TypeVar("V")

# The state of one owner, from its plan and from the state it was in: of several states that are
# right, the mode may choose the one that is nearest.
CompileOwner = Callable[[PortPlan, Mapping[K, V]], Mapping[K, V]]


class ApplyError(Exception):
    """The target refused or lost a write; what it now contains is unknown."""


class Difference(Struct, frozen=True):
    """An entry of a target that is not as it was written; each as text, None where it is not."""

    entry: str
    wanted: str | None
    held: str | None


class Clock(Protocol):
    """Time, in seconds: of a steady clock, and of the calendar."""

    def monotonic(self) -> float: ...
    def unix(self) -> float: ...


class Target(Protocol[K, V]):
    """Where a mode writes. A fake of it is a dictionary."""

    async def adopt(self) -> Mapping[K, V]:
        """Return what it holds now, in terms of the mode's state; also an earlier process's."""
        ...

    def rehearse(self, state: Mapping[K, V]) -> None:
        """Do for these entries what ``apply`` does before it writes. Changes nothing.

        What it raises is a mistake of ours, that ``apply`` would make with them.
        """
        ...

    async def apply(self, delta: Delta[K, V]) -> Mapping[K, str]:
        """Make the change; return, with the reason, the keys that could not be made so.

        It comes after each ``adopt``, even where nothing differs.

        A key that is refused is absent afterwards, whatever it was before. Raises ``ApplyError``
        when nothing certain is known.
        """
        ...

    async def compare(self, wanted: Mapping[K, V]) -> tuple[Difference, ...]:
        """Look which of these entries are not there as they should be. Changes nothing.

        Nothing is remembered of it, and a sync may run meanwhile. Raises ``ApplyError``.
        """
        ...

    async def counters(self, *, by_endpoint: bool) -> Sequence[Entry[K]]:
        """Return what its entries have counted; without ``by_endpoint``, as a whole only.

        Raises ``ApplyError`` where that cannot be known.
        """
        ...

    async def clear(self) -> None:
        """Remove every trace, also an earlier process's."""
        ...

    async def aclose(self) -> None:
        """Release sockets and handles; leave in the kernel what carries traffic."""
        ...


class Verified(Struct, frozen=True):
    """How many entries owners have, and which of them the target does not hold so."""

    entries: int
    differences: tuple[Difference, ...] = ()


class Proxier(Protocol):
    """What carries a plan out for one mode and one family."""

    async def sync(self, plan: Plan, changed: Owners) -> SyncReport: ...
    def distrust(self) -> None: ...
    def written(self) -> Mapping[Any, Any] | None: ...
    async def verify(self, owners: Owners) -> Verified | None: ...
    async def counters(self, *, by_endpoint: bool) -> Reading | None: ...
    async def clear(self) -> None: ...
    async def aclose(self) -> None: ...


class Outer:
    """What stands around a ``Proxier``, and leaves to it whatever it has nothing to add to."""

    def __init__(self, inner: Proxier) -> None:
        self._inner = inner

    def distrust(self) -> None:
        self._inner.distrust()

    def written(self) -> Mapping[Any, Any] | None:
        return self._inner.written()

    async def verify(self, owners: Owners) -> Verified | None:
        return await self._inner.verify(owners)

    async def counters(self, *, by_endpoint: bool) -> Reading | None:
        return await self._inner.counters(by_endpoint=by_endpoint)

    async def clear(self) -> None:
        await self._inner.clear()

    async def aclose(self) -> None:
        await self._inner.aclose()


class Reconciler(Generic[K, V]):
    """A ``Proxier`` made of one pure function and one target.

    It writes the difference to what it last wrote. When a write fails, what the target holds is
    unknown, and the next sync asks it and looks at every owner: no other repair exists. What the
    target refuses is tried again at every sync.

    So is an owner that cannot be compiled, by a mistake of ours. It keeps what was last written
    for it, but for what others want now; and the others are written. A target that stumbles over
    an entry ends the sync; from the next on each owner's are rehearsed, to find out whose it is.
    """

    def __init__(
        self,
        mode: str,
        family: Family,
        compile_owner: CompileOwner[K, V],
        target: Target[K, V],
        clock: Clock,
    ) -> None:
        self._mode = mode
        self._family = family
        self._compile = compile_owner
        self._target = target
        self._clock = clock
        self._written: dict[ServicePortName, Mapping[K, V]] = {}  # with success
        self._is_certain = False  # that the target holds that
        self._doubted = False
        self._rehearses = False  # while the target stumbles over somebody's entries
        self._failed: dict[ServicePortName, str] = {}
        self._refused: dict[ServicePortName, dict[K, str]] = {}
        self._served = 0
        self._syncs = 0  # begun
        self._ended: list[Entry[K]] = []  # whose last counts nobody has taken in yet

    async def sync(self, plan: Plan, changed: Owners) -> SyncReport:
        """Make the target equal to the plan, of which ``changed`` is all that may differ."""
        started = self._clock.monotonic()
        self._syncs += 1
        full, self._doubted = self._doubted or not self._is_certain, False
        self._is_certain = False  # until the write succeeds
        error = None
        delta: Delta[K, V] = Delta({}, {}, {})
        wanted: dict[ServicePortName, Mapping[K, V]] = {}
        try:
            if full:
                held = await self._target.adopt()
                wanted = self._compiled(plan, plan.ports, held)
                delta = diff(held, {k: v for state in wanted.values() for k, v in state.items()})
            else:
                wanted = self._compiled(plan, changed | self._refused.keys() | self._failed.keys())
                delta = merge(diff(self._written.get(o, {}), new) for o, new in wanted.items())
            refused = await self._target.apply(delta) if delta or full else {}
        except ApplyError as failure:
            error = str(failure)
        except Exception:
            self._rehearses = True
            raise
        else:
            if full:
                self._written, self._refused, self._served = {}, {}, 0
            self._remember(wanted, refused)
            self._rehearses = self._rehearses and bool(self._failed)
        failed = {**plan.failed, **self._failed}
        return SyncReport(
            mode=self._mode,
            family=self._family,
            full=full,
            finished_at=self._clock.unix(),
            seconds=self._clock.monotonic() - started,
            owners=len(wanted),
            added=len(delta.added),
            changed=len(delta.changed),
            removed=len(delta.removed),
            served=self._served,
            conflicts=tuple(line for lines in plan.conflicts.values() for line in lines),
            unserved=tuple(why for whys in self._refused.values() for why in whys.values()),
            refused={owner: tuple(whys.values()) for owner, whys in self._refused.items()}
            | {owner: (f"{owner}: {why}",) for owner, why in failed.items()},
            failed=failed,
            no_local_internal=len(plan.without_local_internal),
            no_local_external=len(plan.without_local_external),
            error=error,
        )

    def distrust(self) -> None:
        """Let the next sync compare everything with what the target really holds.

        A sync that is under way may have looked already: it is not the next one.
        """
        self._doubted = True

    def written(self) -> Mapping[K, V] | None:
        """Return what was written for all owners; None while a sync runs, and after a failure."""
        if not self._is_certain:
            return None
        return {k: v for state in self._written.values() for k, v in state.items()}

    async def verify(self, owners: Owners) -> Verified | None:
        """Ask the target whether it holds what was written for owners.

        None if a sync runs, came in between, or failed: what it should hold is not known then.
        Raises ``ApplyError`` where the target cannot be asked.
        """
        if not self._is_certain:
            return None
        syncs = self._syncs
        wanted = {k: v for owner in owners for k, v in self._written.get(owner, {}).items()}
        found = await self._target.compare(wanted)
        if self._syncs != syncs or not self._is_certain:
            return None
        return Verified(len(wanted), found)

    async def counters(self, *, by_endpoint: bool) -> Reading | None:
        """Return what has been counted for owners.

        None if a sync runs, came in between, or failed: whose an entry is, is not known then.
        Raises ``ApplyError`` where the target cannot be asked.
        """
        if not self._is_certain:
            return None
        syncs = self._syncs
        entries = await self._target.counters(by_endpoint=by_endpoint)
        if self._syncs != syncs or not self._is_certain:
            self._ended += [entry for entry in entries if entry.ended]
            return None
        entries, self._ended = [*self._ended, *entries], []
        return Reading(entries, tuple(self._written.items()))

    async def clear(self) -> None:
        self._written, self._is_certain = {}, False
        await self._target.clear()

    async def aclose(self) -> None:
        await self._target.aclose()

    def _compiled(
        self,
        plan: Plan,
        owners: Iterable[ServicePortName],
        held: Mapping[K, V] | None = None,
    ) -> dict[ServicePortName, Mapping[K, V]]:
        """Return the state that each owner is to have, near what is ``held``, or written for it."""
        states: dict[ServicePortName, Mapping[K, V]] = {}
        self._failed = {o: why for o, why in self._failed.items() if o in plan.ports}
        for owner in owners:
            port, before = plan.ports.get(owner), self._written.get(owner, {})
            try:
                near = before if held is None else held
                state = self._compile(port, near) if port is not None else {}
                if self._rehearses:
                    self._target.rehearse(state)
                states[owner] = state
            except Exception as mistake:
                self._failed[owner] = told(mistake)
            else:
                self._failed.pop(owner, None)
        if self._failed:
            taken = {key for state in states.values() for key in state}
            for owner in self._failed:
                before = self._written.get(owner, {})
                states[owner] = {k: v for k, v in before.items() if k not in taken}
        return states

    def _remember(
        self, wanted: Mapping[ServicePortName, Mapping[K, V]], refused: Mapping[K, str]
    ) -> None:
        written = self._written
        for owner, state in wanted.items():
            self._refused.pop(owner, None)
            self._served -= len(written.get(owner, {}))
            lost = {key: refused[key] for key in state if key in refused} if refused else {}
            if lost:
                self._refused[owner] = lost
                state = {key: value for key, value in state.items() if key not in lost}
            self._served += len(state)
            if state:
                written[owner] = state
            else:
                written.pop(owner, None)
        self._is_certain = True

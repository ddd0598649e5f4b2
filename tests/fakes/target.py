"""A target that is a dictionary, refuses what it is told to, and fails when asked."""

from pyproxy.delta import patch
from pyproxy.reconcile import ApplyError, Difference


class FakeTarget:
    def __init__(self, holds=()):
        self.holds = dict(holds)
        self.refuses = set()
        self.fail_next = 0  # how many writes to lose; what is held is anything after one
        self.stumbles_over = set()  # keys, by a mistake of ours
        self.rehearsed = []
        self.writes = []
        self.counted = []  # entries, as they are now

    async def adopt(self):
        return dict(self.holds)

    def rehearse(self, state):
        self.rehearsed.append(state)
        if not self.stumbles_over.isdisjoint(state):
            raise KeyError("no target is without mistakes")

    async def apply(self, delta):
        if not self.stumbles_over.isdisjoint(patch({}, delta)):
            raise KeyError("no target is without mistakes")
        if self.fail_next:
            self.fail_next -= 1
            half = dict(list(delta.added.items())[: len(delta.added) // 2])
            self.holds = {**self.holds, **half}
            raise ApplyError("the kernel said no")
        self.writes.append(delta)
        refused = {key: f"{key} is not to be had" for key in self.refuses & patch({}, delta).keys()}
        wanted = patch(self.holds, delta)
        self.holds = {key: value for key, value in wanted.items() if key not in refused}
        return refused

    async def compare(self, wanted):
        held = {key: self.holds.get(key) for key in wanted}
        return tuple(
            Difference(str(key), str(value), None if held[key] is None else str(held[key]))
            for key, value in wanted.items()
            if held[key] != value
        )

    async def counters(self, *, by_endpoint):
        return [e for e in self.counted if by_endpoint or e.endpoint is None]

    async def clear(self):
        self.holds = {}

    async def aclose(self):
        pass

"""A feed that says what a test tells it to."""

import asyncio


class FakeFeed:
    """Passes on changes from a task of its own inside a group, as the real one does."""

    def __init__(self, *changes):
        self._changes = asyncio.Queue()
        self.events = []
        self.annotations = {}
        self.is_closed = False
        self.recorded = asyncio.Event()
        self.tell(*changes)

    def tell(self, *changes):
        for change in changes:
            self._changes.put_nowait(change)

    async def taken_in(self):
        """Wait until all that was told has been passed on."""
        await self._changes.join()

    async def follow(self, on_change):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pass_on(on_change))

    async def record(self, reason, message, *, warning, action, service):
        self.events.append((reason, message, warning))
        self.recorded.set()

    async def annotate(self, annotations):
        self.annotations |= annotations

    async def aclose(self):
        self.is_closed = True

    async def _pass_on(self, on_change):
        while True:
            on_change(await self._changes.get())
            self._changes.task_done()

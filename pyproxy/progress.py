"""How far the plan of one family is written: which owners are as planned, and since when."""

from collections.abc import Mapping
from typing import Literal

from pyproxy.cache import Owners
from pyproxy.model import Kind, PortPlan, ServicePortName
from pyproxy.report import SyncReport

State = Literal["programmed", "pending", "refused"]
NO_SYNC = "nothing has been written yet"


class Progress:
    """Folds what changed, what was planned and what each sync reports.

    A version is the ``resourceVersion`` of the newest object of a kind, as a number: 0 where
    objects have none, as in manifests.
    """

    def __init__(self) -> None:
        self._noted: Owners = set()
        self._unwritten: Owners = set()
        self._since: dict[ServicePortName, float] = {}
        self._planned: Mapping[Kind, int] = {}
        self._refused: Mapping[ServicePortName, tuple[str, ...]] = {}
        self._written: Mapping[Kind, int] = {}
        self.error: str | None = NO_SYNC
        self.synced_at: float | None = None  # Unix seconds, of the last success

    def noted(self, owners: Owners) -> None:
        """Take in that these owners will have to be planned again."""
        self._noted |= owners

    def planned(self, changed: Owners, versions: Mapping[Kind, int]) -> None:
        """Take in that all is planned, of objects up to ``versions``, and these otherwise now."""
        self._noted.clear()
        self._unwritten |= changed
        self._planned = dict(versions)

    def synced(self, report: SyncReport, ports: Mapping[ServicePortName, PortPlan]) -> None:
        """Take in the sync of all that was planned. After a failed one nothing is certain."""
        self.error = report.error
        if report.error is not None:
            return
        self.synced_at = report.finished_at
        for owner in self._unwritten:
            if owner in ports:
                self._since[owner] = report.finished_at
            else:
                self._since.pop(owner, None)
        self._unwritten.clear()
        self._refused = report.refused
        self._written = self._planned

    def written(self, versions: Mapping[Kind, int]) -> Mapping[Kind, int]:
        """Return up to which version everything is written; ``versions`` are those of now.

        What concerns no owner is written as soon as it is known.
        """
        idle = self.error is None and not self._noted and not self._unwritten
        return versions if idle else self._written

    def state(self, owner: ServicePortName) -> State:
        if self.error is not None or owner in self._unwritten or owner in self._noted:
            return "pending"
        return "refused" if owner in self._refused else "programmed"

    def awaited(self) -> Owners:
        """Return the owners that are still to be written, or whose removal is."""
        return self._unwritten | self._noted

    def refusals(self, owner: ServicePortName) -> tuple[str, ...]:
        """Return what of an owner this node cannot serve, and why."""
        return self._refused.get(owner, ())

    def since(self, owner: ServicePortName) -> float | None:
        """Return when the owner was written as it is, in Unix seconds; None if it is not."""
        return self._since.get(owner) if self.state(owner) == "programmed" else None

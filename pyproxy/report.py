"""What one sync did: all that health, metrics and the log ever learn about it."""

from collections.abc import Mapping
from pathlib import PurePath

from msgspec import Struct, field

from pyproxy.model import Family, ServicePortName


class SyncReport(Struct, frozen=True):
    """The outcome of one sync of one family. ``error`` of None means that it succeeded."""

    mode: str
    family: Family
    full: bool
    finished_at: float  # Unix seconds
    seconds: float  # how long the sync took
    owners: int = 0  # Service ports looked at
    added: int = 0  # entries of the mode's state
    changed: int = 0
    removed: int = 0
    served: int = 0  # entries of the mode's state, all owners together
    conflicts: tuple[str, ...] = ()  # frontends that a second Service asked for
    unserved: tuple[str, ...] = ()  # frontends that this node cannot serve, with the reason
    refused: Mapping[ServicePortName, tuple[str, ...]] = field(default_factory=dict)  # by owner
    failed: Mapping[ServicePortName, str] = field(default_factory=dict)  # our mistake; see told
    no_local_internal: int = 0  # Service ports; see PortPlan
    no_local_external: int = 0
    triggered_at: tuple[float, ...] = ()  # Unix seconds; endpoint changes this sync carried out
    error: str | None = None


class RestoreReport(Struct, frozen=True):
    """What one sync wrote by ``iptables-restore``; numbers of rules, by table."""

    family: Family
    full: bool
    failed: bool  # something was refused, whether or not the rest could be written
    owned: Mapping[str, int]  # all that are ours, those that were not written again included
    written: Mapping[str, int]


def told(mistake: Exception) -> str:
    """Return what a mistake of ours is, and where it was made: enough to report it."""
    trace = mistake.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        file = PurePath(trace.tb_frame.f_code.co_filename)
        where = f" ({'/'.join(file.parts[-2:])}:{trace.tb_lineno})"
    return f"{type(mistake).__name__}: {mistake}{where}"

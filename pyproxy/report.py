"""What one sync did: all that health, metrics and the log ever learn about it."""

from collections.abc import Mapping

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

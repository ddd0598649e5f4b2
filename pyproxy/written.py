"""Answers about what is written, and whether it is there: entries of the kernel, or sockets."""

from pyproxy.view import Answer


class DifferenceRow(Answer, frozen=True):
    """An entry of the kernel, or a socket of ours, that is not as it was written."""

    entry: str
    wanted: str | None
    held: str | None  # null: there is none


class VerifiedFamily(Answer, frozen=True):
    """What one family's entries for a Service are like."""

    family: int
    verdict: str  # agrees, differs, unknown
    entries: int
    differences: tuple[DifferenceRow, ...] = ()
    problem: str = ""  # why it is unknown


class Verification(Answer, frozen=True):
    """The answer of ``/v1/verify``."""

    mode: str
    families: tuple[VerifiedFamily, ...]


class EntryRow(Answer, frozen=True):
    """An entry that a mode has for its plan, in words."""

    kind: str  # where it is: a map, a chain, a kind of server
    name: str
    content: str


class FamilyEntries(Answer, frozen=True):
    """All entries of a family; null while nobody knows: a sync runs, or has failed."""

    family: int
    entries: tuple[EntryRow, ...] | None


class Entries(Answer, frozen=True):
    """The answer of ``/v1/entries``: what is written for the plan, beside the fixed part."""

    mode: str
    families: tuple[FamilyEntries, ...]

"""Refuses clients of Services without endpoints, where the kernel by itself would say nothing."""

import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing, suppress

from pyproxy.counters import Counts
from pyproxy.model import Frontend
from pyproxy.proxier import _nfpack as pack
from pyproxy.proxier._nfnetlink import NfError, NfTables
from pyproxy.proxier._nftarget import delete_tables
from pyproxy.proxier._nfwhole import Whole
from pyproxy.rules import refusals
from pyproxy.rules.listeners import Listener
from pyproxy.rules.nft import Element
from pyproxy.rules.refusals import CHAIN, NAME, RULES, SET, TABLE, refuses_all

log = logging.getLogger(__name__)


class Refusals:
    """The frontends that rules refuse to everybody; the table is there while there are any."""

    def __init__(self) -> None:
        self._candidates: set[Frontend] = set()
        self._refused: set[Frontend] = set()
        self._known = False  # what is there; an earlier process may have left something
        self._complains = True

    def apply(
        self,
        changed: Mapping[Frontend, Listener],
        gone: Iterable[Frontend],
        own: Collection[str],
    ) -> None:
        """Take in how frontends are now, and which addresses are the node's ``own``.

        At those the kernel refuses, unless another program listens. Where there can be no rules,
        connections are accepted and then reset.
        """
        self._candidates -= changed.keys() | set(gone)
        self._candidates |= {f for f, new in changed.items() if refuses_all(f, new.route)}
        refused = {frontend for frontend in self._candidates if frontend.ip not in own}
        new, served = refused - self._refused, self._refused - refused
        self._refused = refused
        if self._known and not new and not served:
            return
        try:
            self._write(new, served)
        except (NfError, OSError) as error:
            self._known = False
            if self._refused and self._complains:
                log.info(
                    "Services without endpoints accept and reset", extra={"reason": str(error)}
                )
                self._complains = False
        else:
            self._known = True

    def counts(self) -> dict[Frontend, Counts]:
        """Return how many packets were refused here; nothing where nobody can tell."""
        if not (self._known and self._refused):
            return {}
        keys = {refusals.element(frontend).key: frontend for frontend in self._refused}
        try:
            with closing(NfTables()) as nf_tables:
                found = nf_tables.counters(TABLE, NAME)
        except (NfError, OSError):
            return {}  # somebody has removed the table
        return {keys[e.key]: Counts(rejected=e.packets) for e in found if e.key in keys}

    def tables(self) -> tuple[Whole, ...]:
        return (whole(self._refused),) if self._known and self._refused else ()

    def renew(self) -> None:
        self._known = False

    def _write(self, new: set[Frontend], served: set[Frontend]) -> None:
        if not self._refused:
            delete_tables([TABLE])
            return
        nf_tables = NfTables()
        try:
            if self._known and self._refused != new:
                with suppress(NfError):  # somebody has removed the table
                    nf_tables.commit(differences(new, served))
                    return
            nf_tables.commit(whole(self._refused).made())
        finally:
            nf_tables.close()


def whole(refused: set[Frontend]) -> Whole:
    return Whole(TABLE, (CHAIN,), RULES, (SET,), {NAME: elements(refused)})


def differences(new: set[Frontend], served: set[Frontend]) -> list[bytes]:
    return [
        *pack.delete_elements(TABLE, NAME, elements(served)),
        *pack.new_elements(TABLE, NAME, elements(new)),
    ]


def remove_refusals() -> None:
    """Remove what an earlier process left. Raises ``OSError``."""
    try:
        delete_tables([TABLE])
    except NfError as error:
        raise OSError(error.errno, str(error)) from error


def elements(frontends: set[Frontend]) -> list[Element]:
    return [refusals.element(frontend) for frontend in sorted(frontends)]

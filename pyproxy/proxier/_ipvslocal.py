"""Which addresses are led to this node for virtual servers, and who wants them."""

from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

from pyproxy.model import ServicePortName
from pyproxy.proxier._vips import RTPROT_IPVS, Vip, frontend_of, one_port, whole_address
from pyproxy.rules.ipvs import Key, LocalAddress


class Leads(Protocol):
    """What leads packets for addresses to this node: ``Vips``, or that and a device."""

    def listed(self) -> set[Vip]: ...
    def add(self, vips: Iterable[Vip]) -> Mapping[Vip, str]: ...
    def remove(self, vips: Iterable[Vip], left: Iterable[Vip] = ()) -> Mapping[Vip, str]: ...
    def close(self) -> None: ...


class LocalAddresses:
    """The users of each address. One without any stays for as long as a connection needs it."""

    def __init__(self) -> None:
        self._users: dict[Vip, set[ServicePortName | None]] = {}
        self._unused: set[Vip] = set()  # those without users: a sync looks at no others

    def read(self, leads: Leads) -> list[LocalAddress]:
        """Begin anew with what is there, whoever wanted it. Raises ``OSError``."""
        listed = leads.listed()
        self._users, self._unused = {vip: {None} for vip in listed}, set()
        return [LocalAddress(vip.ip, frontend_of(vip)) for vip in listed]

    def bind(self, keys: Iterable[LocalAddress], leads: Leads) -> dict[Key, str]:
        """Lead addresses here; return why not, for each that cannot be."""
        by_vip: dict[Vip, list[LocalAddress]] = {}
        for key in keys:
            by_vip.setdefault(vip_of(key), []).append(key)
        failed = leads.add(vip for vip in by_vip if vip not in self._users)
        refused: dict[Key, str] = {}
        for vip, users in by_vip.items():
            if vip in failed:
                refused |= dict.fromkeys(users, failed[vip])
            else:
                self._users.setdefault(vip, set()).update(key.owner for key in users)
                self._unused.discard(vip)
        return refused

    def release(self, key: LocalAddress) -> None:
        """Forget that somebody wants an address."""
        vip = vip_of(key)
        users = self._users.get(vip)
        if users is not None:
            users.discard(key.owner)
            if not users:
                self._unused.add(vip)

    def unbind(self, leads: Leads, needed: Collection[str]) -> None:
        """Lead away the addresses that nobody wants, but for those still needed."""
        gone = {vip for vip in self._unused if vip.ip not in needed}
        if not gone:
            return
        leads.remove(gone, [vip for vip in self._users if vip not in gone])
        self._unused -= gone
        for vip in gone:
            del self._users[vip]

    def missing(self, leads: Leads) -> list[Vip]:
        """Return the addresses that should be led here, and are not. Raises ``OSError``."""
        return sorted(self._users.keys() - leads.listed()) if self._users else []


def vip_of(key: LocalAddress) -> Vip:
    return whole_address(key.ip) if key.only is None else one_port(key.only, RTPROT_IPVS)

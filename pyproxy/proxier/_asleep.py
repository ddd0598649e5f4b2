"""Frontends that nobody has come to yet: as bytes, until somebody does.

A worker has all frontends of the node, and most see no client for long. Awake, one with ten
backends takes some kilobytes.
"""

from pyproxy.model import Frontend, ServicePortName
from pyproxy.proxier._dataplane import DataPlane
from pyproxy.rules.listener_bytes import PackedOwner, listeners_of


class Asleep:
    """The owners that a data plane will serve when somebody comes."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._owner_of: dict[Frontend, PackedOwner] = {}
        self._owners: dict[ServicePortName, PackedOwner] = {}

    def update(self, packed: PackedOwner) -> dict[Frontend, str]:
        """Take in what an owner has; return what of it cannot be served, and why.

        An owner that is awake stays so.
        """
        self._forget(packed.owner)
        fronts = self._plane.fronts
        if fronts.of(packed.owner):
            self._plane.close(fronts.of(packed.owner).keys() - set(packed.frontends))
            return self._wake(packed)
        self._plane.close(f for f in packed.frontends if fronts.holds(f))  # another's until now
        if packed.frontends:
            self._owners[packed.owner] = packed
            self._owner_of |= dict.fromkeys(packed.frontends, packed)
        return {}

    def wake(self, frontend: Frontend) -> bool:
        """Serve a frontend that somebody has come to; say whether there is one."""
        packed = self._owner_of.get(frontend)
        if packed is None:
            return False
        self._forget(packed.owner)
        self._wake(packed)
        return True

    def _wake(self, packed: PackedOwner) -> dict[Frontend, str]:
        for frontend in packed.frontends:
            self._owner_of.pop(frontend, None)
        return self._plane.serve(packed.owner, listeners_of(packed))

    def _forget(self, owner: ServicePortName) -> None:
        packed = self._owners.pop(owner, None)
        for frontend in packed.frontends if packed is not None else ():
            if self._owner_of.get(frontend) is packed:
                del self._owner_of[frontend]

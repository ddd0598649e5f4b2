"""The maps, programs and links of socket load balancing: one family in one cgroup.

A start makes new maps, fills them, and then puts new programs into the links an earlier process
pinned: whoever connects meets the old state or the new one. What belongs to sockets and clients
that exist goes on in pinned maps: flows, affinity, and what a backend stands for.
"""

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

from pyproxy.model import Address, Family, Frontend
from pyproxy.proxier import _bpf
from pyproxy.proxier._socketlb_site import own_cookie
from pyproxy.rules.listeners import Listener
from pyproxy.rules.socketlb import (
    BACKEND,
    FRONTEND,
    KEY,
    MEMBER,
    NODE,
    POD,
    SLOT,
    Content,
    Write,
    changes,
    content,
    mapped_ip,
    packed_address,
)
from pyproxy.rules.socketlb_code import ATTACH, HOOKS, Fds, Hook, program

# How many fit; 16 bytes for each are taken at once, the rest as it is used.
FRONTENDS, SLOTS, MEMBERS = 1 << 17, 1 << 19, 1 << 18
# How many are remembered, the latest used; their memory (10 MB a family) is taken at once.
SOCKETS, FLOWS, CLIENTS = 1 << 16, 1 << 14, 1 << 14
LASTING = ("origins", "reverse", "flows", "affinity")
OTHERS = bytes(8)  # as a namespace's cookie: all that are not named

# Kind, size of keys and of values, number of elements, flags.
SHAPES: Mapping[str, tuple[int, int, int, int, int]] = {
    "frontends": (_bpf.HASH, KEY.size, FRONTEND.size, FRONTENDS, _bpf.GROWS),
    "slots": (_bpf.HASH, SLOT.size, BACKEND.size, SLOTS, _bpf.GROWS),
    "members": (_bpf.HASH, MEMBER.size, 4, MEMBERS, _bpf.GROWS),
    "addresses": (_bpf.HASH, 16, 4, 1 << 10, _bpf.GROWS),
    "origins": (_bpf.HASH, 8, 4, 1 << 12, _bpf.GROWS),
    "reverse": (_bpf.LRU_HASH, 32, BACKEND.size, SOCKETS, 0),
    "flows": (_bpf.LRU_HASH, 32, BACKEND.size, FLOWS, 0),
    "affinity": (_bpf.LRU_HASH, 16, 32, CLIENTS, 0),
}


class SocketBalancer:
    """Gives sockets their backends. Until ``attach``, it only prepares."""

    def __init__(
        self, family: Family, cgroup: Path, pins: Path | None, choose: Callable[[int], int]
    ) -> None:
        """``choose(n)`` returns a random number below ``n``. Raises ``OSError``."""
        self._family = family
        self._cgroup = cgroup
        self._pins = pins
        self._choose = choose
        self._contents: dict[Frontend, Content] = {}
        self._addresses: dict[str, int] = {}
        self._links: list[_bpf.Handle] | None = None
        self._maps: dict[str, _bpf.Map] = {}
        self._programs: dict[Hook, _bpf.Handle] = {}
        try:
            self._maps = {name: self._map(name) for name in SHAPES}
            self._programs = self._loaded()
            self._maps["origins"][struct.pack("=Q", own_cookie())] = struct.pack("=I", NODE)
        except OSError:
            self.close()
            raise

    def put(self, frontend: Frontend, listener: Listener) -> None:
        """Balance connections to a frontend so from now on. Raises ``OSError``."""
        before = self._contents.get(frontend)
        after = content(frontend, listener, before, self._choose(1 << 32))
        try:
            self._write(changes(before, after))
        except OSError:
            self.remove(frontend)
            raise
        if after is None:
            self._contents.pop(frontend, None)
        else:
            self._contents[frontend] = after

    def remove(self, frontend: Frontend) -> None:
        """Leave a frontend to the listeners. Raises ``OSError``."""
        before = self._contents.pop(frontend, None)
        self._write(changes(before, None))

    def place(self, addresses: Mapping[str, int]) -> None:
        """Serve node ports at these addresses, each for a set of origins. Raises ``OSError``."""
        for ip, origins in addresses.items():
            if self._addresses.get(ip) != origins:
                self._maps["addresses"][mapped_ip(ip)] = struct.pack("=I", origins)
        for ip in self._addresses.keys() - addresses.keys():
            del self._maps["addresses"][mapped_ip(ip)]
        self._addresses = dict(addresses)

    def attach(self) -> None:
        """Let the programs see connections, if they do not yet. Raises ``OSError``."""
        if self._links is not None:
            return
        self._links = []
        target = os.open(self._cgroup, os.O_RDONLY)
        try:
            for hook, loaded in self._programs.items():
                self._links.append(self._link(hook, loaded, target))
        finally:
            os.close(target)

    def service_of(self, cookie: bytes, backend: Address) -> tuple[bytes, int] | None:
        """Return the packed address and port that a socket's backend stands for, if any."""
        found = self._maps["reverse"].get(cookie + packed_address(backend) + bytes(4))
        if found is None:
            return None
        ip, port, _zero = BACKEND.unpack(found)
        return ip, int.from_bytes(port, "big")

    def close(self) -> None:
        """Let go of everything; what is pinned goes on."""
        handles: Iterable[_bpf.Handle] = [
            *(self._links or ()), *self._programs.values(), *self._maps.values()
        ]  # fmt: skip
        for handle in handles:
            handle.close()

    def _write(self, writes: Iterable[Write]) -> None:
        """Write in this order; those that follow one another in a map are one system call."""
        for (table, gone), group in groupby(writes, key=lambda w: (w.table, w.value is None)):
            if gone:
                self._maps[table].discard(write.key for write in group)
            else:
                self._maps[table].update([(w.key, w.value) for w in group if w.value is not None])

    def _map(self, name: str) -> _bpf.Map:
        kind, key_size, value_size, entries, flags = SHAPES[name]
        path = self._pins / name if self._pins is not None and name in LASTING else None
        if path is not None and (found := _bpf.pinned_map(path, key_size, value_size)) is not None:
            return found
        created = _bpf.create_map(kind, key_size, value_size, entries, flags=flags, name=name)
        if name == "origins":
            created[OTHERS] = struct.pack("=I", POD)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            created.pin(path)
        return created

    def _loaded(self) -> dict[Hook, _bpf.Handle]:
        fds = Fds(**{name: held.fd for name, held in self._maps.items()})
        try:
            return self._load(fds, can_refuse=True)
        except OSError:
            return self._load(fds, can_refuse=False)

    def _load(self, fds: Fds, *, can_refuse: bool) -> dict[Hook, _bpf.Handle]:
        loaded: dict[Hook, _bpf.Handle] = {}
        try:
            for hook in HOOKS[self._family]:
                loaded[hook] = _bpf.load_program(
                    _bpf.CGROUP_SOCK_ADDR,
                    program(hook, self._family, fds, can_refuse=can_refuse),
                    attach=ATTACH[hook],
                    name=f"pyproxy_{hook}",
                )
        except OSError:
            for handle in loaded.values():
                handle.close()
            raise
        return loaded

    def _link(self, hook: Hook, loaded: _bpf.Handle, target: int) -> _bpf.Handle:
        """Return the pinned link of a hook with its new program, or a new one."""
        path = self._pins / str(hook) if self._pins is not None else None
        if path is not None and (found := _bpf.pinned(path)) is not None:
            try:
                _bpf.update_link(found, loaded)
            except OSError:  # the cgroup it was attached to is gone
                found.close()
                path.unlink()
            else:
                return found
        created = _bpf.create_link(loaded, target, ATTACH[hook])
        return kept(created, path)


def kept(handle: _bpf.Handle, path: Path | None) -> _bpf.Handle:
    """Pin a new object, if there is a path for it. Raises ``OSError``, and then it is closed."""
    if path is not None:
        try:
            handle.pin(path)
        except OSError:
            handle.close()
            raise
    return handle

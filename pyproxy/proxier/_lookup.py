"""The kernel's socket lookup for Service addresses: which of our sockets has a packet.

Linux: Documentation/bpf/prog_sk_lookup.rst; kernel 5.9 or newer, CAP_BPF and CAP_NET_ADMIN.
"""

import os
import socket
from collections.abc import Sequence
from itertools import count

from pyproxy.counters import NOTHING, Counts
from pyproxy.model import Family, Frontend, Network
from pyproxy.proxier import _bpf
from pyproxy.proxier._sockets import Shared, silent
from pyproxy.rules.capture import (
    NO_SOURCES,
    NUMBER,
    ORIGINS,
    Entry,
    Standing,
    address_key,
    counts,
    frontend_key,
    network_key,
    origins,
    packed_entry,
    packed_standing,
    sizes,
)
from pyproxy.rules.capture_code import SERVING_TCP, Maps, code
from pyproxy.rules.listeners import Surroundings

LPM_TRIE = 11
MAX_ENTRIES = 1 << 18


class Unsupported(Exception):
    """This kernel, or this process's privileges, do not allow it."""


class Lookup:
    """The entries for one family, in the network namespace of the process."""

    def __init__(self, family: Family, serving: Sequence[Shared] = ()) -> None:
        """Load the program, which leads to these sockets. Raises ``Unsupported``.

        Of several pairs each is one worker's. The first ``commit`` attaches it: a program that is
        attached knows all frontends.
        """
        self._family = family
        self._pending: dict[bytes, bytes] = {}  # entries that are not in effect yet
        self._lists: dict[Frontend, tuple[int, tuple[Network, ...]]] = {}  # of allowed sources
        self._unused: list[tuple[int, tuple[Network, ...]]] = []
        self._fresh = count(1)
        self._free: list[int] = []  # numbers that were used before
        self._origins: set[bytes] = set()
        self._node_port_keys: set[bytes] = set()
        self._sinks: list[socket.socket] = []
        self._handles: list[_bpf.Handle] = []
        self._link: _bpf.Handle | None = None
        try:
            self._open(serving)
        except OSError as error:
            self.close()
            raise Unsupported(error.strerror) from error

    @property
    def kept(self) -> list[int]:
        """The file descriptors that a process must have for packets to be led as they are now."""
        link = [self._link.fd] if self._link is not None else []
        return link + [sink.fileno() for sink in self._sinks]

    def _open(self, serving: Sequence[Shared]) -> None:
        size = sizes(self._family)
        self._entries = self._map(_bpf.HASH, size.entry, size.value)
        self._networks = self._map(LPM_TRIE, size.network, 4)
        self._sinks += [silent(self._family, "TCP"), silent(self._family, "UDP")]
        led_to = [*self._sinks, *(sock for pair in serving for sock in pair)]
        count = max(len(led_to), SERVING_TCP)
        with _bpf.create_map(_bpf.SOCKMAP, 4, 4, count, name="pyproxy") as sockets:
            self._loaded = self._program(sockets, max(len(serving), 1))
            self._handles.append(self._loaded)
            for index, sock in enumerate(led_to):
                sockets[NUMBER.pack(index)] = NUMBER.pack(sock.fileno())

    def _program(self, sockets: _bpf.Map, workers: int) -> _bpf.Handle:
        maps = Maps(self._entries.fd, self._networks.fd, sockets.fd)
        made = code(self._family, maps, workers)
        attach = _bpf.ATTACH_SK_LOOKUP
        return _bpf.load_program(_bpf.SK_LOOKUP, made, attach=attach, name="pyproxy")

    def close(self) -> None:
        """Detach the program: its link ends with its descriptor."""
        for handle in reversed(self._handles):
            handle.close()
        for sink in self._sinks:
            sink.close()

    def put(self, frontend: Frontend, entry: Entry) -> None:
        """Make an entry, or replace it, with the next ``commit``. Raises ``OSError``."""
        number, sources = self._lists.get(frontend, (NO_SOURCES, None))
        if entry.sources != sources:
            self._drop_list(frontend)
            number = NO_SOURCES
            if entry.sources is not None:
                number = self._with_list(frontend, entry.sources)
        self._pending[frontend_key(frontend, self._family)] = packed_entry(entry, number)

    def drop(self, frontend: Frontend) -> None:
        self._forget(frontend_key(frontend, self._family))
        self._drop_list(frontend)

    def stand(self, ip: str, standing: Standing) -> None:
        """Say what an address is, with the next ``commit``."""
        self._pending[address_key(ip, self._family)] = packed_standing(standing)

    def fall(self, ip: str) -> None:
        """Say no more what an address is."""
        self._forget(address_key(ip, self._family))

    def commit(self) -> None:
        """Have all in effect; an entry is replaced between two packets. Raises ``OSError``."""
        self._entries.update(list(self._pending.items()))
        self._pending.clear()
        if self._link is None:
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
            try:
                self._link = _bpf.create_link(self._loaded, namespace, _bpf.ATTACH_SK_LOOKUP)
            finally:
                os.close(namespace)
            self._loaded.close()  # the link keeps the program
            self._handles.append(self._link)
        for number, networks in self._unused:
            self._networks.discard(network_key(network, number) for network in networks)
            self._free.append(number)
        self._unused.clear()

    def counts(self, frontend: Frontend) -> Counts:
        """Return the packets that a frontend has refused since its entry is as it is.

        Raises ``OSError``.
        """
        value = self._entries.get(frontend_key(frontend, self._family))
        return counts(value) if value is not None else NOTHING

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in where connections come from, and at which addresses node ports are served.

        Where they are served everywhere, that is still each address of the node by name: rules of
        nf_tables look for sockets of packets that only pass through, and the program is asked then.
        """
        wanted = {
            network_key(network): NUMBER.pack(ORIGINS[origin])
            for network, origin in origins(around, self._family).items()
        }
        for key, value in wanted.items():
            self._networks[key] = value
        self._networks.discard(self._origins - wanted.keys())
        self._origins = set(wanted)
        ips = node_port_ips if node_port_ips is not None else around.node_ips
        keys = {address_key(ip, self._family) for ip in ips}
        self._pending |= dict.fromkeys(keys, packed_standing("node ports"))
        for key in self._node_port_keys - keys:
            self._forget(key)
        self._node_port_keys = keys

    def _with_list(self, frontend: Frontend, networks: tuple[Network, ...]) -> int:
        """Make a list of sources for a frontend; return its number."""
        if not self._free:
            self._free.append(next(self._fresh))
        number = self._free.pop()
        self._lists[frontend] = number, networks
        for network in networks:
            self._networks[network_key(network, number)] = NUMBER.pack(1)
        return number

    def _drop_list(self, frontend: Frontend) -> None:
        """Give up a list of sources, once no entry has its number any more."""
        found = self._lists.pop(frontend, None)
        if found is not None:
            self._unused.append(found)

    def _forget(self, key: bytes) -> None:
        self._pending.pop(key, None)
        del self._entries[key]

    def _map(self, kind: int, key_size: int, value_size: int) -> _bpf.Map:
        created = _bpf.create_map(
            kind, key_size, value_size, MAX_ENTRIES, flags=_bpf.GROWS, name="pyproxy"
        )
        self._handles.append(created)
        return created

"""The kernel's socket lookup for Service addresses: which of our sockets has a packet.

Linux: Documentation/bpf/prog_sk_lookup.rst; kernel 5.9 or newer, CAP_BPF and CAP_NET_ADMIN.
"""

import os
import socket
from collections.abc import Sequence
from itertools import count

from pyproxy.model import Family, Frontend, Network
from pyproxy.proxier import _bpf
from pyproxy.proxier._sockets import silent
from pyproxy.rules.capture import (
    NUMBER,
    ORIGINS,
    STANDINGS,
    Entry,
    Standing,
    address_key,
    frontend_key,
    origin_key,
    origins,
    packed_entry,
    sizes,
    source_key,
)
from pyproxy.rules.capture_code import FIRST_WORKER, SINK_OF_TCP, SINK_OF_UDP, Maps, code
from pyproxy.rules.listeners import Surroundings

LPM_TRIE = 11
MAX_ENTRIES = 1 << 18
MAX_WORKERS = 256


class Unsupported(Exception):
    """This kernel, or this process's privileges, do not allow it."""


class Lookup:
    """The entries for one family, in the network namespace of the process."""

    def __init__(self, family: Family, workers: int = 1) -> None:
        """Load and attach the program. Raises ``Unsupported``."""
        self._family = family
        self._numbers: dict[Frontend, tuple[int, tuple[Network, ...]]] = {}  # of their sources
        self._fresh = count(1)
        self._free: list[int] = []  # numbers that were used before
        self._origins: set[bytes] = set()
        self._node_port_keys: set[bytes] = set()
        self._sinks: list[socket.socket] = []
        self._handles: list[_bpf.Handle] = []
        try:
            self._open(workers)
        except OSError as error:
            self.close()
            raise Unsupported(error.strerror) from error

    def _open(self, workers: int) -> None:
        size, grows = sizes(self._family), _bpf.GROWS
        self._frontends = self._map(_bpf.HASH, size.frontend, 8, flags=grows)
        self._addresses = self._map(_bpf.HASH, size.address, 4, flags=grows)
        self._origin_map = self._map(LPM_TRIE, size.origin, 4, flags=grows)
        self._sources = self._map(LPM_TRIE, size.source, 4, flags=grows)
        entries = FIRST_WORKER + 2 * workers
        self._sockets = self._map(_bpf.SOCKMAP, 4, 4, entries=entries)
        self._sinks += [silent(self._family, "TCP"), silent(self._family, "UDP")]
        for index, sink in zip((SINK_OF_TCP, SINK_OF_UDP), self._sinks, strict=True):
            self._sockets[NUMBER.pack(index)] = NUMBER.pack(sink.fileno())
        found = (self._frontends, self._addresses, self._origin_map, self._sources, self._sockets)
        program = _bpf.load_program(
            _bpf.SK_LOOKUP,
            code(self._family, Maps(*(each.fd for each in found)), workers),
            attach=_bpf.ATTACH_SK_LOOKUP,
            name="pyproxy",
        )
        self._handles.append(program)
        namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            self._handles.append(_bpf.create_link(program, namespace, _bpf.ATTACH_SK_LOOKUP))
        finally:
            os.close(namespace)

    def close(self) -> None:
        """Detach the program: its link ends with its descriptor."""
        for handle in reversed(self._handles):
            handle.close()
        for sink in self._sinks:
            sink.close()

    def lead_to(self, worker: int, tcp: socket.socket, udp: socket.socket) -> None:
        """Give the packets of a worker to these sockets. Raises ``OSError``."""
        for offset, sock in enumerate((tcp, udp)):
            index = FIRST_WORKER + 2 * worker + offset
            self._sockets[NUMBER.pack(index)] = NUMBER.pack(sock.fileno())

    def put(self, frontend: Frontend, entry: Entry) -> None:
        """Make an entry, or replace it, between two packets. Raises ``OSError``."""
        before = self._numbers.get(frontend)
        number, sources = before or (0, ())
        wanted = entry.sources
        if wanted != (sources if before else None):
            number = self._with_sources(wanted) if wanted is not None else 0
        try:
            self._frontends[frontend_key(frontend, self._family)] = packed_entry(entry, number)
        except OSError:
            if before is None or number != before[0]:
                self._forget(number, wanted or ())
            raise
        if wanted is not None:
            self._numbers[frontend] = number, wanted
        else:
            self._numbers.pop(frontend, None)
        if before is not None and before[0] != number:
            self._forget(*before)

    def drop(self, frontend: Frontend) -> None:
        del self._frontends[frontend_key(frontend, self._family)]
        before = self._numbers.pop(frontend, None)
        if before is not None:
            self._forget(*before)

    def stand(self, ip: str, standing: Standing) -> None:
        """Say what an address is, the empty one being all others. Raises ``OSError``."""
        self._addresses[address_key(ip, self._family)] = NUMBER.pack(STANDINGS[standing])

    def forget(self, ip: str) -> None:
        del self._addresses[address_key(ip, self._family)]

    def surround(self, around: Surroundings, node_port_ips: Sequence[str] | None) -> None:
        """Take in where connections come from, and at which addresses node ports are served."""
        wanted = {
            origin_key(network): NUMBER.pack(ORIGINS[origin])
            for network, origin in origins(around, self._family).items()
        }
        for key, value in wanted.items():
            self._origin_map[key] = value
        self._origin_map.discard(self._origins - wanted.keys())
        self._origins = set(wanted)
        ips = node_port_ips if node_port_ips is not None else ("",)
        keys = {address_key(ip, self._family) for ip in ips}
        value = NUMBER.pack(STANDINGS["node ports"])
        for key in keys:
            self._addresses[key] = value
        self._addresses.discard(self._node_port_keys - keys)
        self._node_port_keys = keys

    def _with_sources(self, networks: tuple[Network, ...]) -> int:
        """Make a new list of sources; return its number."""
        if not self._free:
            self._free.append(next(self._fresh))
        number = self._free.pop()
        for network in networks:
            self._sources[source_key(number, network)] = NUMBER.pack(1)
        return number

    def _forget(self, number: int, networks: tuple[Network, ...]) -> None:
        if number:
            self._sources.discard(source_key(number, network) for network in networks)
            self._free.append(number)

    def _map(
        self,
        kind: int,
        key_size: int,
        value_size: int,
        *,
        entries: int = MAX_ENTRIES,
        flags: int = 0,
    ) -> _bpf.Map:
        created = _bpf.create_map(kind, key_size, value_size, entries, flags=flags, name="pyproxy")
        self._handles.append(created)
        return created

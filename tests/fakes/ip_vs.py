"""The virtual servers of a kernel, which understands the messages it is sent."""

import errno
import struct

from pyproxy.counters import Counts
from pyproxy.model import Address
from pyproxy.proxier import _ipvsnl as nl
from pyproxy.proxier._ipvsnl import Busy
from pyproxy.proxier._netlink import attributes
from pyproxy.reconcile import Difference
from pyproxy.rules.ipvs import Destination, Server

NOTHING = Counts(connections=0, packets_in=0, packets_out=0, bytes_in=0, bytes_out=0)
KERNELS = ("rr", "wrr", "lc", "wlc", "sh", "dh", "mh", "sed", "nq")


class FakeIpvs:
    def __init__(self, schedulers=KERNELS):
        self.schedulers = schedulers
        self.known = {}
        self.backends = {}
        self.counts = {}
        self.foreign = set()
        self.sent = []  # requests for a change
        self.dumps = 0

    def carry_out(self, requests):
        self.sent += requests
        results = [(request, self._carry_out(request)) for request in requests]
        return [(request, code) for request, code in results if code]

    def servers(self, *, ours=True):
        self.dumps += 1
        return {f: server for f, server in self.known.items() if (f in self.foreign) != ours}

    def destinations(self, server):
        self.dumps += 1
        return dict(self.backends.get(server, {}))

    def counters(self):
        return {f: self.counts.get(f, NOTHING) for f in self.servers()}

    def destination_counters(self, server):
        found = self.destinations(server)
        return {a: self.counts.get(Destination(server, a), NOTHING) for a in found}

    def connect(self, destination, *, active=0, inactive=0):
        """Have a destination used by so many connections."""
        held = self.backends[destination.server]
        held[destination.address] = held[destination.address]._replace(
            active=active, inactive=inactive
        )

    def close(self):
        pass

    def _carry_out(self, request):
        subject = request.subject
        if request.command in (nl.NEW_SERVICE, nl.SET_SERVICE, nl.DEL_SERVICE):
            return self._server(request.command, subject, request.body)
        if subject.server not in self.known:
            return errno.ESRCH
        held = self.backends[subject.server]
        if (request.command == nl.NEW_DEST) == (subject.address in held):
            return errno.EEXIST if request.command == nl.NEW_DEST else errno.ENOENT
        if request.command == nl.DEL_DEST:
            del held[subject.address]
            return 0
        before = held.get(subject.address, Busy(0, 0, 0))
        address, weight = unpacked_destination(request.body)
        held[address] = before._replace(weight=weight)
        return 0

    def _server(self, command, frontend, body):
        if (command == nl.NEW_SERVICE) == (frontend in self.known):
            return errno.EEXIST if command == nl.NEW_SERVICE else errno.ESRCH
        self.foreign.discard(frontend)
        if command == nl.DEL_SERVICE:
            del self.known[frontend], self.backends[frontend]
            return 0
        server = unpacked_server(body)
        if server.scheduler not in self.schedulers:
            return errno.ENOENT
        self.known[frontend] = server
        self.backends.setdefault(frontend, {})
        return 0


class FakeVips:
    def __init__(self):
        self.local = set()

    def listed(self):
        return set(self.local)

    def add(self, vips):
        self.local.update(vips)
        return {}

    def remove(self, vips, left=()):
        self.local.difference_update(vips)
        return {}

    def close(self):
        pass


class FakeTable:
    """The table beside the virtual servers: a dictionary."""

    def __init__(self):
        self.items = {}

    async def adopt(self):
        return dict(self.items)

    async def compare(self, wanted):
        return tuple(
            Difference(str(key), str(value), None)
            for key, value in wanted.items()
            if self.items.get(key) != value
        )

    async def apply(self, delta):
        for item in delta.removed:
            del self.items[item]
        self.items |= delta.added
        self.items |= {item: new for item, (_old, new) in delta.changed.items()}
        return {}

    async def clear(self):
        self.items.clear()

    async def aclose(self):
        pass


def unpacked_server(body):
    values = dict(attributes(dict(attributes(body, 0))[nl.SERVICE], 0))
    flags, mask = struct.unpack("=II", values[nl.FLAGS])
    assert flags & nl.OURS
    assert mask == 0xFFFFFFFF
    seconds = struct.unpack("=I", values[nl.TIMEOUT])[0] if flags & nl.PERSISTENT else None
    return Server(values[nl.SCHEDULER].rstrip(b"\0").decode(), seconds)


def unpacked_destination(body):
    values = dict(attributes(dict(attributes(body, 0))[nl.DEST], 0))
    assert values[nl.D_METHOD] == bytes(4), "masquerading"
    ip = ".".join(map(str, values[nl.D_ADDR][:4]))
    port = int.from_bytes(values[nl.D_PORT], "big")
    return Address(ip, port), struct.unpack("=I", values[nl.D_WEIGHT])[0]

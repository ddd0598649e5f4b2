"""A busy UDP flow on real sockets: each datagram arrives as it was sent, and in order."""

import socket
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyproxy.proxier._batch import DATAGRAMS, Batch
from pyproxy.proxier._stream import THICK, Way

SO_NO_CHECK = 11  # no checksums of UDP: then the kernel takes no packet apart
UDP_GRO = 104  # what came as one packet is read as one
SIZES = st.lists(st.sampled_from([0, 1, 64, 1200, 1472, 9000]), min_size=1, max_size=DATAGRAMS)
ALIKE = st.builds(
    lambda size, times, last: [size] * times + [last],
    st.sampled_from([64, 1472]),
    st.integers(1, DATAGRAMS - 1),
    st.sampled_from([0, 1, 64, 1472]),
)


def pair():
    """Two UDP sockets that are connected to each other."""
    near, far = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (near, far):
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    near.connect(far.getsockname())
    far.connect(near.getsockname())
    return near, far


class Flow:
    """One direction, which the test works by hand: what is sent is received at the other end."""

    def __init__(self):
        self.client, source = pair()
        sink, self.backend = pair()
        self.sockets = self.client, source, sink, self.backend
        self.sink = sink
        self.poller = SimpleNamespace(rounds=0)
        self.seen = Counter()
        self.refused = []
        self.way = Way(self.poller, Batch(), source, sink, self.refused.append, self.count)

    def __enter__(self):
        for _ in range(THICK):
            assert self.moved([b"thick"]) == [b"thick"]
        self.seen.clear()
        return self

    def __exit__(self, *_):
        for sock in self.sockets:
            sock.close()

    def count(self, datagrams, size):
        self.seen += Counter(datagrams=datagrams, size=size)

    def moved(self, datagrams):
        """Send; return what has arrived after one round of the poller."""
        for data in datagrams:
            self.client.send(data)
        self.poller.rounds += 1
        self.way.ready(0)
        return [self.backend.recv(65536) for _ in datagrams]


def filled(sizes):
    return [bytes([number]) * size for number, size in enumerate(sizes)]


@pytest.mark.parametrize("no_checksums", [0, 1], ids=["as one", "one by one"])
@settings(max_examples=40, deadline=None)
@given(st.one_of(SIZES, ALIKE))
def test_a_batch_arrives_datagram_by_datagram(no_checksums, sizes):
    sent = filled(sizes)
    with Flow() as flow:
        flow.sink.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, no_checksums)
        assert flow.moved(sent) == sent
        assert flow.seen == Counter(datagrams=len(sent), size=sum(sizes))


@pytest.mark.parametrize(
    ("sizes", "packets"),
    [
        ([700, 700, 700], [2100]),
        ([700, 700, 1], [1401]),
        ([700, 1, 700], [700, 1, 700]),
        ([700, 701], [700, 701]),
        ([0, 0], [0, 0]),
        ([700, 0], [700, 0]),
        ([9000] * 8, [9000] * 8),
    ],
)
def test_datagrams_of_one_size_travel_as_one_packet(sizes, packets):
    with Flow() as flow:
        flow.backend.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        for data in filled(sizes):
            flow.client.send(data)
        flow.way.ready(0)
        assert [len(flow.backend.recv(65536)) for _ in packets] == packets


def test_a_backend_that_is_gone_refuses_a_batch_that_travels_as_one():
    with Flow() as flow:
        flow.backend.close()
        for _ in range(2):
            for data in filled([700, 700]):
                flow.client.send(data)
            flow.way.ready(0)
        assert flow.refused == [flow.sink]

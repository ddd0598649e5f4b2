"""The bpf system call, on the real kernel."""

import os
import socket
import struct
from pathlib import Path

import pytest

from pyproxy.proxier import _bpf
from pyproxy.rules.ebpf import FP, R0, R1, R2, R3, R6, Assembler
from tests.netns.conftest import ALLOW

CONNECT4 = 10


pytestmark = pytest.mark.usefixtures("privileged")


def number(n):
    return struct.pack("=I", n)


@pytest.fixture
def squares():
    with _bpf.create_map(_bpf.HASH, 4, 8, 1000, flags=_bpf.GROWS, name="squares") as squares:
        yield squares


def test_a_map_keeps_what_is_put_into_it(squares):
    squares[number(3)] = struct.pack("=Q", 9)
    squares[number(3)] = struct.pack("=Q", 10)
    assert squares.get(number(3)) == struct.pack("=Q", 10)
    assert squares.get(number(4)) is None
    del squares[number(3)]
    del squares[number(3)]
    assert list(squares.keys()) == []


def test_many_elements_are_one_call(squares):
    squares.update([(number(n), struct.pack("=Q", n * n)) for n in range(500)])
    assert sorted(squares.keys()) == sorted(number(n) for n in range(500))
    assert squares.get(number(300)) == struct.pack("=Q", 90000)
    squares.discard([number(n) for n in range(1, 500)])
    assert list(squares.keys()) == [number(0)]


def test_a_map_that_is_full_says_so():
    with (
        _bpf.create_map(_bpf.HASH, 4, 8, 2) as small,
        pytest.raises(OSError, match="Argument list too long"),
    ):
        small.update([(number(n), bytes(8)) for n in range(3)])


def test_a_refused_program_is_explained():
    asm = Assembler()
    asm.load(R0, R1, 4096)
    asm.exit()
    with pytest.raises(PermissionError, match="invalid bpf_context access off=4096"):
        _bpf.load_program(_bpf.SK_LOOKUP, asm.code(), attach=_bpf.ATTACH_SK_LOOKUP)


def counting(counts):
    """Count the lookups of UDP sockets."""
    asm = Assembler()
    asm.load(R6, R1, 12, 4)
    asm.store(FP, -4, 0, 4)
    asm.map(R1, counts.fd)
    asm.set(R2, FP)
    asm.compute(R2, "+", -4)
    asm.call(1)
    asm.jump_if(R0, "==", 0, "pass")
    asm.jump_if(R6, "!=", socket.IPPROTO_UDP, "pass", bits=32)
    asm.set(R3, 1)
    asm.fetch_and_add(R0, 0, R3)
    asm.label("pass")
    asm.exit(1)
    return _bpf.load_program(_bpf.SK_LOOKUP, asm.code(), attach=_bpf.ATTACH_SK_LOOKUP)


def send_one():
    with (
        socket.socket(type=socket.SOCK_DGRAM) as server,
        socket.socket(type=socket.SOCK_DGRAM) as c,
    ):
        server.bind(("127.0.0.1", 0))
        c.sendto(b"?", server.getsockname())
        assert server.recv(10) == b"?"


def test_a_program_runs_while_its_link_is_open_and_can_be_replaced():
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    with (
        _bpf.create_map(_bpf.ARRAY, 4, 8, 1) as counts,
        _bpf.create_map(_bpf.ARRAY, 4, 8, 1) as others,
        counting(counts) as program,
        counting(others) as replacement,
    ):
        with _bpf.create_link(program, namespace, _bpf.ATTACH_SK_LOOKUP) as link:
            os.close(namespace)
            send_one()
            assert counts.get(number(0)) == struct.pack("=Q", 1)
            _bpf.update_link(link, replacement)
            send_one()
        send_one()
        assert counts.get(number(0)) == struct.pack("=Q", 1)
        assert others.get(number(0)) == struct.pack("=Q", 1)


def test_a_pin_keeps_an_object_without_its_process(bpffs):
    path = bpffs / "squares"
    assert _bpf.pinned(path) is None
    with _bpf.create_map(_bpf.HASH, 4, 8, 10) as created:
        created[number(5)] = struct.pack("=Q", 25)
        created.pin(path)
    with _bpf.pinned_map(path, 4, 8) as found:
        assert found.get(number(5)) == struct.pack("=Q", 25)
    path.unlink()
    assert _bpf.pinned_map(path, 4, 8) is None


def test_a_program_is_attached_to_a_cgroup(test_cgroup):
    with _bpf.load_program(_bpf.CGROUP_SOCK_ADDR, ALLOW, attach=CONNECT4) as program:
        target = os.open(test_cgroup, os.O_RDONLY)
        try:
            _bpf.create_link(program, target, CONNECT4).close()
        finally:
            os.close(target)


def test_handles_are_closed_once(squares):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with _bpf.create_map(_bpf.HASH, 4, 8, 10) as other:
        other.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before

import errno
import struct

import pytest

from pyproxy.model import Frontend
from pyproxy.proxier._conntrack import CT_NEW, FEW, Sieve, questions
from pyproxy.proxier._netlink import HEADER, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR

DNS = Frontend("10.96.0.10", 53, "UDP")
OTHER_DNS = Frontend("203.0.113.7", 53, "UDP")
NODE_PORT = Frontend("", 30053, "UDP")


def message(kind, *, flags=0, code=0):
    body = struct.pack("=i", -code) + bytes(200)
    return HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body


def many(count, proto):
    return [Frontend("10.96.0.1", 1000 + number, proto) for number in range(count)]


@pytest.mark.parametrize(
    ("frontends", "asked"),
    [
        pytest.param([], set(), id="nothing"),
        pytest.param([DNS], {DNS}, id="an address"),
        pytest.param([DNS, DNS], {DNS}, id="once"),
        pytest.param([NODE_PORT], {NODE_PORT}, id="a node port"),
        pytest.param([DNS, OTHER_DNS], {Frontend("", 53, "UDP")}, id="two addresses, one port"),
        pytest.param([DNS, DNS._replace(proto="TCP")], {DNS, DNS._replace(proto="TCP")}, id="both"),
        pytest.param(many(FEW, "UDP"), set(many(FEW, "UDP")), id="a few ports"),
        pytest.param(many(FEW + 1, "UDP"), {Frontend("", 0, "UDP")}, id="many ports"),
        pytest.param(
            [*many(FEW, "UDP"), *many(1, "TCP")],
            {Frontend("", 0, "UDP"), Frontend("", 0, "TCP")},
            id="many ports of two protocols",
        ),
    ],
)
def test_the_kernel_is_asked_few_questions(frontends, asked):
    assert questions(frontends).keys() == asked


def test_every_answer_is_looked_through_for_what_was_asked():
    wanted = [DNS, OTHER_DNS, NODE_PORT, *many(9, "SCTP")]
    found = [f for asked_for in questions(wanted).values() for f in asked_for]
    assert sorted(found) == sorted(wanted)


def test_a_dump_ends_with_its_last_message():
    sieve = Sieve(4, [DNS])
    assert not sieve.sift(message(CT_NEW))
    assert sieve.sift(message(CT_NEW) + message(NLMSG_DONE))
    assert (sieve.found, sieve.interrupted) == ([], False)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(message(CT_NEW, flags=NLM_F_DUMP_INTR), id="a flow says so"),
        pytest.param(message(NLMSG_DONE, flags=NLM_F_DUMP_INTR), id="the end says so"),
        pytest.param(message(NLMSG_DONE, code=errno.EINTR), id="as an error"),
    ],
)
def test_a_disturbed_dump_is_noticed(data):
    sieve = Sieve(4, [DNS])
    sieve.sift(data)
    assert sieve.interrupted


@pytest.mark.parametrize("kind", [NLMSG_ERROR, NLMSG_DONE])
def test_other_errors_are_raised(kind):
    with pytest.raises(OSError, match="EPERM") as caught:
        Sieve(4, [DNS]).sift(message(kind, code=errno.EPERM))
    assert caught.value.errno == errno.EPERM

"""Virtual servers as text."""

from pyproxy.model import Address, Frontend
from pyproxy.proxier._ipvsnl import SCHEDULER_FLAGS
from pyproxy.rules.ipvs import Destination, Server
from pyproxy.rules.ipvs_text import FLAGS, text
from pyproxy.rules.nftables import PRESENT, Item

WEB = Frontend("10.96.0.2", 80, "TCP")
DNS = Frontend("fd96::a", 53, "UDP")
SIGNAL = Frontend("10.96.0.10", 5060, "SCTP")


def test_the_text_is_what_ipvsadm_saves():
    items = {
        Item("served", b"key"): PRESENT,
        SIGNAL: Server("sh"),
        Destination(WEB, Address("10.244.1.10", 8080)): 0,
        Destination(WEB, Address("10.244.1.9", 8080)): 3,
        WEB: Server("wrr", 30),
        DNS: Server("rr", 60),
        Destination(DNS, Address("fd02::1", 53)): 1,
    }
    assert text(items) == (
        "-A -t 10.96.0.2:80 -s wrr -p 30 -b flag-3\n"
        "-a -t 10.96.0.2:80 -r 10.244.1.9:8080 -m -w 3\n"
        "-a -t 10.96.0.2:80 -r 10.244.1.10:8080 -m -w 0\n"
        "-A --sctp-service 10.96.0.10:5060 -s sh -b sh-fallback,flag-3\n"
        "-A -u [fd96::a]:53 -s rr -p 60 -M 128 -b flag-3\n"
        "-a -u [fd96::a]:53 -r [fd02::1]:53 -m -w 1\n"
    )


def test_all_schedulers_with_flags_have_them_here_too():
    assert FLAGS.keys() == SCHEDULER_FLAGS.keys()

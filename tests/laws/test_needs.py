"""What is led to mode userspace is kept up to date change by change, and never counted anew."""

from hypothesis import given
from hypothesis import strategies as st

from pyproxy.model import Forward, Frontend, Pass, Pool, Route
from pyproxy.proxier._vips import Needs, one_port, vip_of, whole_address

OWN = {"192.0.2.1"}
IPS = ("10.96.0.1", "198.18.0.1", "192.0.2.1", "127.0.0.1", "")
frontends = st.builds(Frontend, st.sampled_from(IPS), st.sampled_from((80, 81)), st.just("TCP"))


def route(frontend, kind, *, passes):
    served = Forward(Pool(()))
    inside = Pass() if passes else served
    return Route(frontend, kind, inside, inside, served)


routes = st.builds(
    route, frontends, st.sampled_from(("ClusterIP", "ExternalIP")), passes=st.booleans()
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), routes, st.sampled_from((frozenset(), frozenset(OWN)))),
        st.tuples(st.just("drop"), frontends),
        st.tuples(st.just("look")),
    )
)


@given(steps)
def test_needs_are_those_of_the_frontends_that_are_there(steps):
    needs, there, led = Needs(), {}, set()
    for word, *rest in [*steps, ("look",)]:
        if word == "put":
            needs.put(rest[0].frontend, *rest)
            there[rest[0].frontend] = rest
        elif word == "drop":
            needs.drop(rest[0])
            there.pop(rest[0], None)
        else:
            changed = needs.changed()
            led = (led - changed) | (changed & needs.of.keys())
    expected = {}
    for frontend, (found, own) in there.items():
        if (vip := vip_of(frontend, found, own)) is not None:
            expected.setdefault(vip, set()).add(frontend)
    assert needs.of == expected
    assert led == expected.keys(), "who looks at the changes alone misses nothing"
    led_here = {frontend for users in expected.values() for frontend in users}
    assert needs.passed == {f for f in led_here if isinstance(there[f][0].from_node, Pass)}


def test_a_cluster_ip_is_led_here_whole_and_others_by_their_ports():
    frontend = Frontend("10.96.0.1", 80, "TCP")
    assert vip_of(frontend, route(frontend, "ClusterIP", passes=False), OWN) == whole_address(
        frontend.ip
    )
    assert vip_of(frontend, route(frontend, "ExternalIP", passes=False), OWN) == one_port(frontend)
    for ip in ("", "127.0.0.1", "192.0.2.1"):
        own = Frontend(ip, 80, "TCP")
        assert vip_of(own, route(own, "NodePort", passes=False), OWN) is None

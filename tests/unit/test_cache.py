import pytest

from pyproxy.cache import Cache
from pyproxy.model import ObjectName, Remove, Replace, Upsert
from tests.builders import (
    address,
    draining,
    endpoint,
    endpoint_slice,
    owner,
    service,
)

WEB = owner()
NAME = ObjectName("default", "web")


def put(cache, obj, kind="EndpointSlice"):
    return cache.apply(Upsert(kind, obj))


@pytest.fixture
def cache():
    cache = Cache(4, started_at=100.0)
    put(cache, service(), "Service")
    return cache


def addresses(cache):
    return [str(e.address) for e in cache.endpoints(WEB)]


def test_a_new_service_concerns_its_ports():
    cache = Cache(4)
    two = service(ports=(("http", "TCP", 80), ("dns", "UDP", 53)))
    assert put(cache, two, "Service") == {owner(port="http"), owner(port="dns", proto="UDP")}
    assert set(cache.owners()) == {owner(port="http"), owner(port="dns", proto="UDP")}


def test_an_edit_that_a_proxy_does_not_look_at_is_no_change(cache):
    assert put(cache, service(warnings=("odd annotation",)), "Service") == set()


def test_a_port_that_vanishes_is_planned_once_more(cache):
    assert put(cache, service(ports=(("", "TCP", 81),)), "Service") == {WEB}
    assert put(cache, service(ports=()), "Service") == {WEB}
    assert cache.port(WEB) is None
    assert put(cache, service(ports=()), "Service") == set()


def test_a_slice_concerns_the_ports_it_serves(cache):
    assert put(cache, endpoint_slice("s", endpoint(1))) == {WEB}
    assert put(cache, endpoint_slice("s", endpoint(1))) == set()
    assert put(cache, endpoint_slice("s", endpoint(1), endpoint(2))) == {WEB}
    assert put(cache, endpoint_slice("t", endpoint(3), port="other")) == set()


def test_a_slice_may_come_before_its_service():
    cache = Cache(4)
    assert put(cache, endpoint_slice("s", endpoint(1))) == set()
    assert put(cache, service(), "Service") == {WEB}
    assert addresses(cache) == ["10.244.1.1:8080"]


def test_slices_of_a_service_are_united_and_sorted_as_text(cache):
    put(cache, endpoint_slice("s", endpoint(2), endpoint(10)))
    put(cache, endpoint_slice("t", endpoint(2), endpoint(1, port=9090)))
    assert addresses(cache) == ["10.244.1.10:8080", "10.244.1.1:9090", "10.244.1.2:8080"]


@pytest.mark.parametrize("order", [("s", "t"), ("t", "s")])
def test_an_endpoint_that_is_not_terminating_beats_one_that_is(cache, order):
    slices = {"s": endpoint_slice("s", draining(1)), "t": endpoint_slice("t", endpoint(1))}
    for name in order:
        put(cache, slices[name])
    assert [e.ready for e in cache.endpoints(WEB)] == [True]


def test_an_address_that_moves_between_slices_is_never_missing(cache):
    put(cache, endpoint_slice("s", endpoint(1)))
    put(cache, endpoint_slice("t", endpoint(1)))
    assert put(cache, endpoint_slice("s")) == {WEB}
    assert addresses(cache) == ["10.244.1.1:8080"]


def test_a_slice_that_goes_takes_its_endpoints_along(cache):
    put(cache, endpoint_slice("s", endpoint(1)))
    name = ObjectName("default", "s")
    assert cache.apply(Remove("EndpointSlice", name)) == {WEB}
    assert addresses(cache) == []
    assert cache.apply(Remove("EndpointSlice", name)) == set()


def test_a_slice_given_to_another_service_leaves_the_first(cache):
    put(cache, service("api", "10.96.0.2"), "Service")
    put(cache, endpoint_slice("s", endpoint(1)))
    assert put(cache, endpoint_slice("s", endpoint(1), of="api")) == {WEB, owner("api")}
    assert addresses(cache) == []


def test_slices_of_the_other_family_are_not_seen(cache):
    assert put(cache, endpoint_slice("s", endpoint(1), family=6)) == set()


def test_a_list_replaces_what_was_there(cache):
    put(cache, service("old", "10.96.0.2"), "Service")
    new = service("new", "10.96.0.3")
    changed = cache.apply(Replace("Service", (service(), new)))
    assert changed == {owner("old"), owner("new")}
    put(cache, endpoint_slice("s", endpoint(1)))
    changed = cache.apply(Replace("EndpointSlice", (endpoint_slice("t", endpoint(2)),)))
    assert changed == {WEB}
    assert addresses(cache) == ["10.244.1.2:8080"]


@pytest.mark.parametrize(
    ("at", "taken"),
    [
        pytest.param(150.0, (150.0,), id="since we started"),
        pytest.param(50.0, (), id="before we started"),
        pytest.param(None, (), id="none"),
    ],
)
def test_trigger_times_are_taken_once(cache, at, taken):
    put(cache, endpoint_slice("s", endpoint(1), triggered_at=at))
    assert cache.take_triggers() == taken
    assert cache.take_triggers() == ()


def test_a_removal_forgets_the_trigger_times_of_its_service(cache):
    put(cache, endpoint_slice("s", endpoint(1), triggered_at=150.0))
    cache.apply(Remove("EndpointSlice", ObjectName("default", "s")))
    assert cache.take_triggers() == ()


def test_a_deleted_service_leaves_nothing_behind(cache):
    put(cache, endpoint_slice("s", endpoint(1)))
    assert cache.apply(Remove("Service", NAME)) == {WEB}
    assert cache.port(WEB) is None
    assert list(cache.owners()) == []
    assert cache.endpoints(WEB)[0].address == address(1), "slices outlive their Service"


def test_services_are_kept_for_those_who_ask_whether_they_are_served_or_not():
    cache = Cache(4)
    put(cache, service("web", resource_version="7"), "Service")
    put(cache, service("headless", None, resource_version="9"), "Service")
    put(cache, endpoint_slice("s", endpoint(1), resource_version="x3"))
    put(cache, endpoint_slice("s", endpoint(1), resource_version="3" * 5000))
    assert {str(name) for name in cache.services()} == {"default/web", "default/headless"}
    assert cache.ports(owner("headless").service_name) == ()
    assert [part.name.name for part in cache.slices(owner("web").service_name)] == ["s"]
    assert cache.versions == {"Service": 9}, "what is no number is no version"
    cache.apply(Replace("Service", ()))
    assert cache.services() == {}

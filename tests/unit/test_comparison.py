from msgspec.structs import replace

from pyproxy.comparison import (
    EndpointChange,
    FieldChange,
    RouteChange,
    RouteChanges,
    endpoint_changes,
    route_changes,
)
from pyproxy.listing import EndpointRow, RouteRow

WEB = RouteRow(
    "default", "web", "http", "10.96.0.1:80/TCP", "ClusterIP", 4,
    "forward to 2", "forward to 2, masquerade", "forward to 2", None, "programmed",
)  # fmt: skip
NODE_PORT = replace(WEB, frontend="node:30080/TCP", kind="NodePort")
ENDPOINT = EndpointRow("default", "web", "http", "10.244.1.2:8080", "", "", "", (), False, True)


def test_the_same_routes_differ_in_nothing():
    assert route_changes((WEB, NODE_PORT), (NODE_PORT, replace(WEB, state="planned"))) == ()


def test_frontends_come_and_go():
    assert route_changes((WEB,), (NODE_PORT,)) == (
        RouteChange("removed", 4, "10.96.0.1:80/TCP", "default/web:http"),
        RouteChange("added", 4, "node:30080/TCP", "default/web:http"),
    )


def test_a_node_port_is_one_in_each_family():
    both = (NODE_PORT, replace(NODE_PORT, family=6))
    assert route_changes(both, both[:1]) == (
        RouteChange("removed", 6, "node:30080/TCP", "default/web:http"),
    )


def test_what_is_different_about_a_frontend_is_named():
    limited = replace(WEB, from_outside="drop", allowed_sources=("10.0.0.0/8",), service="api")
    assert route_changes((WEB,), (limited,)) == (
        RouteChange(
            "changed", 4, "10.96.0.1:80/TCP", "default/api:http",
            (
                FieldChange("service", "web", "api"),
                FieldChange("from outside", "forward to 2", "drop"),
                FieldChange("allowed sources", "everybody", "10.0.0.0/8"),
            ),
        ),
    )  # fmt: skip


def test_only_endpoints_in_use_count():
    other = replace(ENDPOINT, address="10.244.1.3:8080")
    unused = replace(ENDPOINT, used=False)
    assert endpoint_changes((ENDPOINT, replace(other, used=False)), (unused, other)) == (
        EndpointChange("removed", "default/web:http", "10.244.1.2:8080"),
        EndpointChange("added", "default/web:http", "10.244.1.3:8080"),
    )


def test_another_mode_is_a_difference():
    assert RouteChanges("here", "nftables", "nftables", ()).is_equal
    assert not RouteChanges("here", "nftables", "ipvs", ()).is_equal

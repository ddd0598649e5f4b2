"""A plan in which everything occurs that rules of mode iptables can say."""

from ipaddress import ip_network

from pyproxy.model import Address, Endpoint, ServicePort, ServicePortName, WeightRule
from pyproxy.plan import Plan, Site, plan_port
from pyproxy.topology import Place

NODE_IP = {4: "192.0.2.11", 6: "fd00:c0de::11"}
RANGE = {4: "203.0.113.0/25", 6: "fd00:5e::/64"}


def vip(family, number):
    return f"10.96.{number // 200}.{number % 200}" if family == 4 else f"fd00:10:96::{number:x}"


def backend(family, number, port=8080):
    ip = f"10.244.1.{number}" if family == 4 else f"fd00:10:244::{number:x}"
    return Address(ip, port)


def endpoints_of(family, count, *, local=1):
    """Endpoints of which the first so many are on this node."""
    return [
        Endpoint(backend(family, n), node="here" if n <= local else "elsewhere")
        for n in range(1, count + 1)
    ]


def variants(family):
    """The fields of Services, each unlike the others, and how many endpoints each has."""
    balanced = {"load_balancer_ips": (vip(family, 900),), "node_port": 30900}
    return {
        "web": ({}, 3),
        "node": ({"node_port": 30001}, 2),
        "weighted": ({"weights": (WeightRule("ip", backend(family, 1).ip, 5),)}, 3),
        "turns": ({"scheduler": "rr"}, 3),
        "sticky": ({"affinity_seconds": 60, "node_port": 30002}, 3),
        "empty": ({"node_port": 30003, "external_ips": (vip(family, 901),)}, 0),
        "guarded": ({**balanced, "source_ranges": (ip_network(RANGE[family]),)}, 2),
        "local": (
            {
                "external_local": True,
                "health_check_node_port": 31000,
                "load_balancer_ips": (vip(family, 902),),
                "node_port": 30004,
            },
            3,
        ),
        "inside": ({"internal_local": True, "node_port": 30005}, 3),
    }


def cluster(family, *, endpoints=3, others=20):
    """A plan of each variant and of plain Services; ``endpoints`` is how many ``web`` has."""
    plan = Plan()
    site = Site(Place("here", ""), NODE_IP[family])
    found = variants(family) | {f"plain-{n}": ({}, 2) for n in range(others)}
    for number, (name, (fields, count)) in enumerate(found.items(), 1):
        for proto in ("TCP", "UDP", "SCTP") if name == "web" else ("TCP",):
            owner = ServicePortName("default", name, "", proto)
            port = ServicePort(name=owner, cluster_ip=vip(family, number), port=80, **fields)
            count = endpoints if owner == ServicePortName("default", "web", "", "TCP") else count
            plan.put(owner, plan_port(port, endpoints_of(family, count), site))
    absent = ServicePortName("default", "elsewhere", "http", "TCP")
    port = ServicePort(
        name=absent,
        cluster_ip=vip(family, 800),
        port=80,
        external_local=True,
        node_port=30006,
        external_ips=(vip(family, 903),),
    )
    plan.put(absent, plan_port(port, endpoints_of(family, 2, local=0), site))
    return plan

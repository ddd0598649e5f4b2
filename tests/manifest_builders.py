"""Documents of manifests with good defaults, and what they resolve to."""

from ipaddress import ip_network

from pyproxy.manifests.resolve import Memory, Settings, resolve
from pyproxy.render import RENDERERS, scenes

DUAL = (ip_network("10.96.0.0/16"), ip_network("fd00:10:96::/112"))
SETTINGS = Settings("here", DUAL)


def service(name="web", *, status=None, port=80, ports=None, **spec):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"ports": [{"port": port}] if ports is None else ports, **spec},
        "status": status,
    }


def pod(number=1, *, app="web", ip=None, node="here", ports=(), status=None, **metadata):
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"pod-{number}", "labels": {"app": app}, **metadata},
        "spec": {"nodeName": node, "containers": [{"ports": list(ports)}]},
        "status": {"podIP": ip or f"10.244.1.{number}", **(status or {})},
    }


def node(name, zone):
    labels = {"topology.kubernetes.io/zone": zone}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def hand_written(name="by-hand", *, of="web", **fields):
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["10.9.9.9"]}],
        **fields,
    }


def resolved(*documents, settings=SETTINGS):
    return resolve({"shop.yaml": documents}, Memory(), settings)


def faults(*documents, settings=SETTINGS):
    return [str(fault) for fault in resolved(*documents, settings=settings).faults]


def rules_text(mode, objects, settings):
    """What ``pyproxy render`` prints of objects."""
    return RENDERERS[mode](scenes(mode, objects, settings))

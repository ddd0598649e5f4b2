"""A synthetic cluster: Services of one TCP port, all with as many endpoints, as a server sends it.

The objects are as long as real ones: half of their bytes is what a proxy passes over.
"""

from collections.abc import Iterator
from ipaddress import IPv4Address

import msgspec

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
NODES = "/api/v1/nodes"
CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"
NODE = "node-a"
NODE_IP = "192.0.2.11"
PORT, TARGET_PORT = 80, 8080
FIRST_CLUSTER_IP = int(IPv4Address("10.96.0.10"))
FIRST_ENDPOINT = int(IPv4Address("10.128.0.10"))
FIRST_NEWCOMER = int(IPv4Address("10.224.0.10"))

_encode = msgspec.json.Encoder().encode
_words = ("name", "port", "protocol", "addresses", "conditions", "targetRef")
_fields = {f"f:{word}": {} for word in _words}


class Cluster:
    """What there is. Each change replaces one endpoint of one Service by one never seen before."""

    def __init__(self, services: int, endpoints_per_service: int) -> None:
        self.services = services
        self.endpoints_per_service = endpoints_per_service
        self._version = 1
        self._newcomers = 0
        self._endpoints = [
            [address(first + i) for i in range(endpoints_per_service)]
            for first in range(
                FIRST_ENDPOINT, FIRST_ENDPOINT + self.endpoint_count, endpoints_per_service
            )
        ]

    @property
    def endpoint_count(self) -> int:
        return self.services * self.endpoints_per_service

    def lists(self):
        return {
            SERVICES: self._services,
            SLICES: self._slices,
            NODES: lambda: [event("ADDED", node())],
            CIDRS: lambda: [event("ADDED", service_cidr())],
        }

    def change(self) -> tuple[str, bytes]:
        """Replace an endpoint; return its address, and the event that tells of it.

        Each change is of another Service than the last ones.
        """
        number = self.next_to_change()
        new = address(FIRST_NEWCOMER + self._newcomers)
        slot = self._newcomers // self.services % self.endpoints_per_service
        self._endpoints[number][slot] = new
        self._newcomers += 1
        self._version += 1
        return new, event("MODIFIED", self._slice(number))

    def next_to_change(self) -> int:
        return self._newcomers * 7 % self.services

    def endpoints(self, number: int) -> list[str]:
        return self._endpoints[number]

    def cluster_ip(self, number: int) -> str:
        return address(FIRST_CLUSTER_IP + number)

    def _services(self) -> Iterator[bytes]:
        return (event("ADDED", self._service(n)) for n in range(self.services))

    def _slices(self) -> Iterator[bytes]:
        return (event("ADDED", self._slice(n)) for n in range(self.services))

    def _service(self, number: int) -> dict:
        ip, name = self.cluster_ip(number), service_name(number)
        return {
            "kind": "Service",
            "apiVersion": "v1",
            "metadata": metadata(name, 1, {"app": name}),
            "spec": {
                "ports": [
                    {"name": "http", "protocol": "TCP", "port": PORT, "targetPort": TARGET_PORT}
                ],
                "selector": {"app": name},
                "clusterIP": ip,
                "clusterIPs": [ip],
                "type": "ClusterIP",
                "sessionAffinity": "None",
                "ipFamilies": ["IPv4"],
                "ipFamilyPolicy": "SingleStack",
                "internalTrafficPolicy": "Cluster",
            },
            "status": {"loadBalancer": {}},
        }

    def _slice(self, number: int) -> dict:
        name = service_name(number)
        labels = {
            "kubernetes.io/service-name": name,
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }
        return {
            "kind": "EndpointSlice",
            "apiVersion": "discovery.k8s.io/v1",
            "metadata": metadata(f"{name}-x", self._version, labels),
            "addressType": "IPv4",
            "endpoints": [endpoint(ip, name) for ip in self._endpoints[number]],
            "ports": [{"name": "http", "protocol": "TCP", "port": TARGET_PORT}],
        }


def service_name(number: int) -> str:
    return f"service-{number}"


def address(number: int) -> str:
    return str(IPv4Address(number))


def event(kind: str, obj: dict) -> bytes:
    return _encode({"type": kind, "object": obj}) + b"\n"


def metadata(name: str, version: int, labels: dict) -> dict:
    return {
        "name": name,
        "namespace": "default",
        "uid": "6f1c4d4e-97a1-4b1e-8d34-5a3a0c1f2b7d",
        "resourceVersion": str(version),
        "generation": 1,
        "creationTimestamp": "2025-01-01T00:00:00Z",
        "labels": labels,
        "managedFields": [
            {"manager": who, "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": _fields}
            for who in ("kubectl", "kube-controller-manager")
        ],
    }


def endpoint(ip: str, service: str) -> dict:
    return {
        "addresses": [ip],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {
            "kind": "Pod",
            "namespace": "default",
            "name": f"{service}-{ip}",
            "uid": "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0",
        },
        "nodeName": "node-b",
        "zone": "zone-1",
    }


def node() -> dict:
    return {
        "metadata": {**metadata(NODE, 1, {}), "namespace": ""},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": NODE_IP}]},
    }


def service_cidr() -> dict:
    meta = {"name": "kubernetes", "resourceVersion": "1"}
    return {"metadata": meta, "spec": {"cidrs": ["10.96.0.0/12"]}}

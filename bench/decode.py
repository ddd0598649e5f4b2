"""Decode a large cluster: seconds, memory, and the ratio to the standard library's json.

python bench/decode.py [SERVICES] [ENDPOINTS_PER_SERVICE]
"""

import gc
import json
import resource
import sys
import tracemalloc
from collections.abc import Callable
from time import perf_counter

from pyproxy.kube.decode import decode_event
from pyproxy.model import Kind

ROUNDS = 3


def service_line(index: int) -> bytes:
    name = f"svc-{index:05d}"
    ip = f"10.{96 + index // 65536}.{index // 256 % 256}.{index % 256}"
    obj = {
        "metadata": {**metadata(name, index), "labels": {"app": name, "team": "a"}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ip,
            "clusterIPs": [ip],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "internalTrafficPolicy": "Cluster",
            "sessionAffinity": "None",
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
        "status": {"loadBalancer": {}},
    }
    return added(obj)


def slice_line(index: int, size: int) -> bytes:
    name = f"svc-{index:05d}"
    first = index * size
    labels = {
        "kubernetes.io/service-name": name,
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
    }
    obj = {
        "metadata": {**metadata(f"{name}-x", index), "labels": labels},
        "addressType": "IPv4",
        "endpoints": [endpoint(number) for number in range(first, first + size)],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }
    return added(obj)


def endpoint(number: int) -> dict[str, object]:
    ip = f"10.{128 + number // 65536}.{number // 256 % 256}.{number % 256}"
    return {
        "addresses": [ip],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{number % 100}",
        "zone": f"zone-{number % 3}",
        "targetRef": {"kind": "Pod", "namespace": "default", "name": f"pod-{number}", "uid": "u"},
        "hints": {"forZones": [{"name": f"zone-{number % 3}"}]},
    }


def metadata(name: str, index: int) -> dict[str, object]:
    fields = {"f:spec": {"f:ports": {}, "f:selector": {}, "f:type": {}}, "f:metadata": {}}
    manager = {"manager": "kubectl", "operation": "Update", "fieldsV1": fields}
    return {
        "name": name,
        "namespace": f"team-{index % 50}",
        "resourceVersion": str(index + 1),
        "uid": f"00000000-0000-0000-0000-{index:012d}",
        "managedFields": [manager],
    }


def added(obj: object) -> bytes:
    return json.dumps({"type": "ADDED", "object": obj}, separators=(",", ":")).encode()


def shortest(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        gc.collect()
        started_at = perf_counter()
        kept = run()
        seconds.append(perf_counter() - started_at)
        del kept
    return min(seconds)


def main(services: int = 10_000, endpoints_per: int = 10) -> None:
    lines: list[tuple[bytes, Kind]] = []
    lines += [(service_line(index), "Service") for index in range(services)]
    lines += [(slice_line(index, endpoints_per), "EndpointSlice") for index in range(services)]
    megabytes = sum(len(line) for line, _ in lines) / 1e6
    decoded = shortest(lambda: [decode_event(line, kind) for line, kind in lines])
    parsed = shortest(lambda: [json.loads(line) for line, _ in lines])
    tracemalloc.start()
    kept = [decode_event(line, kind) for line, kind in lines]
    held = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{len(kept)} objects, {services * endpoints_per} endpoints, {megabytes:.0f} MB of JSON")
    print(f"decode {decoded:.3f} s; json.loads {parsed:.3f} s; ratio {decoded / parsed:.2f}")
    print(f"objects hold {held:.0f} MB; process at most {peak:.0f} MB with the JSON itself")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

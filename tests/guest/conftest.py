"""The node of these tests: a namespace of their own, on a kernel with ip_vs and SCTP."""

import os
import socket

import pytest

from pyproxy.config import Config
from pyproxy.proxier._ipvsnl import Ipvs
from tests.guest import lab
from tests.netns.conftest import in_host_namespace


def why_not():
    if os.geteuid():
        return "only root can"
    if in_host_namespace():
        return "this is the host's own network namespace"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
        Ipvs(4).close()
    except OSError as error:
        return f"this kernel has no SCTP or no ip_vs ({error.strerror})"
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if "/guest/" in str(item.path):
            item.fixturenames.insert(0, "node_namespace")


@pytest.fixture(scope="session")
def node_namespace():
    reason = why_not()
    if reason is not None:
        reason += ": make guest runs these tests where they can"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    lab.build()
    yield
    lab.remove()


@pytest.fixture(params=[4, 6], ids=["IPv4", "IPv6"])
def family(request):
    return request.param


@pytest.fixture
def config(family):
    return Config(cluster_cidr=lab.PODS[family])

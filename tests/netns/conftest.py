"""A network namespace to break things in: these tests refuse to run in the host's own."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyproxy.config import Config, Userspace
from pyproxy.proxier import _bpf
from pyproxy.proxier._socketlb_site import BPFFS
from tests.netns.standin import NODE_IP, printed

ALLOW = bytes.fromhex("b7000000010000009500000000000000")  # r0 = 1; exit

ADDRESSES = ("192.0.2.11/32", "192.0.2.12/32", "198.51.100.50/32", "10.244.1.10/32")
ADDRESSES6 = ("fd00:c0de::11/128", "fd00:5e::50/128", "fd00:10:244::10/128")


def pytest_collection_modifyitems(items):
    for item in items:
        if "/netns/" in str(item.path):
            item.fixturenames.insert(0, "namespace")


def in_host_namespace():
    """A namespace of our own is new: in it nothing but lo has ever been up."""
    links = subprocess.Popen(["ip", "-o", "link"], stdout=subprocess.PIPE, text=True)
    lines, _ = links.communicate()
    others = [line for line in lines.splitlines() if ": lo:" not in line]
    return any(",UP" in line or "<UP" in line for line in others)


@pytest.fixture(scope="session")
def namespace():
    """Addresses of the node, of a stranger and of a pod, all on lo of a namespace of our own."""
    if in_host_namespace():
        reason = "run it as: tests/netns/isolated pytest tests/netns (make netns does)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    lines = ["link set lo up", *(f"addr replace {a} dev lo" for a in ADDRESSES)]
    lines += [f"addr replace {a} dev lo nodad" for a in ADDRESSES6]
    batch = subprocess.Popen(["ip", "-batch", "-"], stdin=subprocess.PIPE, text=True)
    batch.communicate("\n".join(lines))
    assert batch.returncode == 0


@pytest.fixture
def process_names():
    """For who looks at the names of all processes, or has one that is looked for: one at a time."""
    with Path(__file__).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def may_load():
    try:
        _bpf.load_program(_bpf.SK_LOOKUP, ALLOW, attach=_bpf.ATTACH_SK_LOOKUP).close()
    except PermissionError:
        return False
    return True


@pytest.fixture
def privileged():
    """The right to load programs, which root of a user namespace has not."""
    if not may_load():
        reason = "run it as root: a user namespace gives no right to load programs"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def bpffs():
    """A bpf file system of the test's own, over any that is where pyproxy looks first."""
    run("mount", "-t", "bpf", "bpf", str(BPFFS))
    yield BPFFS
    run("umount", str(BPFFS))


@pytest.fixture
def test_cgroup():
    """A cgroup (v2) with nobody but this process in it, until the test is over."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(where) for _what, where, kind, *_ in mounts if kind == "cgroup2"), None)
    assert root is not None, "no cgroup2 file system is mounted"
    own = root / Path("/proc/self/cgroup").read_text().rsplit("::/", 1)[1].strip()
    group = own / f"pyproxy-test-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    yield group
    (own / "cgroup.procs").write_text(str(os.getpid()))
    group.rmdir()


@pytest.fixture
def config(privileged, test_cgroup, bpffs):
    """Settings that balance the sockets of the test's own process."""
    return Config(userspace=Userspace(cgroup=str(test_cgroup)))


def run(*command):
    done = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, said = done.communicate()
    assert done.returncode == 0, said


@pytest.fixture
def uplink():
    """Give packets a way out that ends at once, and leave nothing of a proxy behind."""
    printed("ip", "link", "add", "uplink", "type", "bridge")
    printed("ip", "link", "set", "uplink", "arp", "off", "up")
    printed("ip", "route", "add", "default", "dev", "uplink", "src", NODE_IP)
    yield
    printed("ip", "link", "delete", "uplink")
    printed(sys.executable, "-m", "pyproxy", "cleanup")

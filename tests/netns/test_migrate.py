"""``pyproxy migrate``: between modes no new connection fails, and no long one is lost."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.root

LIMIT_SECONDS = {"fast": 240, "slow": 900}
# Mode ipvs needs a kernel that has it: see tests/guest.
MOVES = [
    ("moved", "kube-iptables", "iptables"),
    ("moved", "kube-iptables", "nftables"),
    ("moved", "kube-nftables", "iptables"),
    ("moved", "kube-nftables", "nftables"),
    ("moved", "iptables", "nftables"),
    ("moved", "nftables", "iptables"),
    ("entered", "kube-iptables", "userspace"),
    ("entered", "iptables", "userspace"),
    ("entered", "nftables", "userspace"),
    ("left", "userspace", "iptables"),
    ("left", "userspace", "nftables"),
]
BESIDE = [
    ("kube-iptables", "nftables"),
    ("kube-nftables", "nftables"),
    ("kube-iptables", "userspace"),
]
FAILING = [("kube-iptables", "nftables"), ("kube-nftables", "nftables"), ("nftables", "iptables")]
RULES = {
    "iptables": ["iptables"],
    "nftables": ["table ip pyproxy", "table ip6 pyproxy"],
    "userspace": [],
    "ipvs": ["table ip pyproxy-ipvs", "table ip6 pyproxy-ipvs"],
    "kube-iptables": ["iptables"],
    "kube-nftables": ["table ip kube-proxy"],
}


def told(story, old, new, speed="fast"):
    words = [sys.executable, "-m", "tests.netns.moves", story, old, new, speed]
    # As in a container: what is told is to be read while the program runs.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=env) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS[speed])
    if process.returncode and "Unavailable" in errors and not os.environ.get("CI"):
        pytest.skip(errors.strip().splitlines()[-1])
    assert process.returncode == 0, errors
    return json.loads(output)


@pytest.mark.parametrize(("story", "old", "new"), MOVES, ids=[f"{o} to {n}" for _, o, n in MOVES])
def test_nothing_is_lost_on_the_way(story, old, new):
    found = told(story, old, new)
    assert found["code"] == 0, found["output"]
    assert (found["failures"], found["lost"]) == ([], [])
    assert min(found["made"].values()) > 60
    assert found["rules"] == RULES[new]


@pytest.mark.parametrize(("old", "new"), BESIDE, ids=[f"{o} and {n}" for o, n in BESIDE])
def test_a_service_goes_to_the_proxy_beside_and_back(old, new):
    found = told("beside", old, new)
    assert (found["failures"], found["lost"]) == ([], [])
    assert found["output"].startswith("ConnectionRefusedError\n")
    assert found["rules"] == RULES[old], "after a cleanup of ours"


@pytest.mark.parametrize(("old", "new"), FAILING, ids=[f"{o} to {n}" for o, n in FAILING])
def test_a_move_that_fails_is_undone_and_nobody_notices(old, new):
    found = told("blocked", old, new)
    assert found["code"] == 1
    assert "1 cluster IPs whose endpoints answer do not: 10.96.0.12:8080" in found["output"]
    assert f"rolled back: mode {new} has no rules" in found["output"]
    assert (found["failures"], found["lost"]) == ([], [])
    assert found["rules"] == RULES[old]

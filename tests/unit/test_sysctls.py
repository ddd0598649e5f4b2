import os

import pytest

from pyproxy.config import Conntrack
from pyproxy.proxier._sysctls import (
    Unset,
    apply,
    count_cpus,
    is_tracking,
    max_flows,
    set_limits,
    wanted,
    wanted_hashsize,
)

MAX = "net/netfilter/nf_conntrack_max"
ESTABLISHED = "net/netfilter/nf_conntrack_tcp_timeout_established"
HASHSIZE = "sys/module/nf_conntrack/parameters/hashsize"


@pytest.mark.parametrize(
    ("fields", "cpus", "expected"),
    [
        pytest.param({}, 2, 131072, id="the default minimum"),
        pytest.param({}, 8, 262144, id="by CPU"),
        pytest.param({"max_per_core": 1, "min": 123456}, 4, 123456, id="an explicit minimum"),
        pytest.param({}, 512, 1048576, id="at most"),
        pytest.param({}, 32, 1048576, id="exactly the most"),
        pytest.param({"min": 2_000_000}, 8, 2_000_000, id="a minimum above the most"),
        pytest.param({"min": 2_000_000}, 512, 1048576, id="no minimum above many CPUs' most"),
        pytest.param({"max_per_core": 0, "min": 123456}, 4, 0, id="left alone, minimum ignored"),
    ],
)
def test_how_many_flows_are_tracked(fields, cpus, expected):
    assert max_flows(Conntrack(**fields), cpus) == expected


def test_the_defaults_set_three_sysctls():
    assert list(wanted(Conntrack(), 8).items()) == [
        (MAX, 262144),
        (ESTABLISHED, 86400),
        ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", 3600),
    ]


def test_everything_is_set_in_order_and_in_whole_seconds():
    conntrack = Conntrack(
        tcp_established_timeout_seconds=90.9,
        tcp_close_wait_timeout_seconds=1.5,
        tcp_be_liberal=True,
        udp_timeout_seconds=30.0,
        udp_stream_timeout_seconds=120.0,
    )
    prefix = "net/netfilter/nf_conntrack_"
    assert list(wanted(conntrack, 8).items()) == [
        (MAX, 262144),
        (f"{prefix}tcp_timeout_established", 90),
        (f"{prefix}tcp_timeout_close_wait", 1),
        (f"{prefix}tcp_be_liberal", 1),
        (f"{prefix}udp_timeout", 30),
        (f"{prefix}udp_timeout_stream", 120),
    ]


def test_zeros_leave_everything_alone():
    zeros = Conntrack(
        max_per_core=0, tcp_established_timeout_seconds=0.0, tcp_close_wait_timeout_seconds=0.0
    )
    assert wanted(zeros, 8) == {}


@pytest.mark.parametrize(
    ("current", "expected"),
    [
        pytest.param(16384, 32768, id="too small"),
        pytest.param(32768, None, id="just enough"),
        pytest.param(65536, None, id="never made smaller"),
    ],
)
def test_the_hash_has_a_bucket_for_four_flows(current, expected):
    assert wanted_hashsize(131072, current) == expected


@pytest.fixture
def root(tmp_path):
    put(tmp_path, f"proc/sys/{MAX}", "65536\n")
    put(tmp_path, f"proc/sys/{ESTABLISHED}", "432000\n")
    put(tmp_path, HASHSIZE, "16384\n")
    return tmp_path


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_values_are_written(root):
    assert apply({MAX: 131072, ESTABLISHED: 86400}, root) == ()
    assert (root / "proc/sys" / MAX).read_text() == "131072\n"
    assert (root / "proc/sys" / ESTABLISHED).read_text() == "86400\n"
    assert (root / HASHSIZE).read_text() == "32768\n"


def test_the_hash_is_left_alone_unless_the_maximum_is_set(root):
    assert apply({ESTABLISHED: 86400}, root) == ()
    assert (root / HASHSIZE).read_text() == "16384\n"


def test_what_is_equal_is_not_written(root):
    path = root / "proc/sys" / ESTABLISHED
    os.utime(path, (1, 1))
    assert apply({ESTABLISHED: 432000}, root) == ()
    assert path.stat().st_mtime == 1


def test_what_is_missing_is_reported_and_the_rest_is_set(root):
    problems = apply({"net/netfilter/nf_conntrack_absent": 1, ESTABLISHED: 86400}, root)
    assert list(map(str, problems)) == [
        "cannot set net.netfilter.nf_conntrack_absent to 1: "
        "this kernel has no such setting, or nf_conntrack is not loaded"
    ]
    assert (root / "proc/sys" / ESTABLISHED).read_text() == "86400\n"


def test_what_cannot_be_written_is_reported(root):
    put(root, "proc/sys/net/netfilter/nf_conntrack_folder/x", "")
    problems = apply({"net/netfilter/nf_conntrack_folder": 1}, root)
    assert problems == (Unset("net.netfilter.nf_conntrack_folder", 1, "Is a directory"),)


def test_limits_are_set_where_connections_are_tracked(root, tmp_path_factory):
    assert is_tracking(root)
    limits = Conntrack(tcp_close_wait_timeout_seconds=0.0)
    assert set_limits(limits, root) == ()
    assert (root / "proc/sys" / ESTABLISHED).read_text() == "86400\n"
    assert not is_tracking(tmp_path_factory.mktemp("untracked"))


def test_cpus_are_those_that_are_online(tmp_path):
    for number in (0, 1, 10):
        put(tmp_path, f"sys/devices/system/cpu/cpu{number}/topology/core_id", "0")
    put(tmp_path, "sys/devices/system/cpu/cpu2/online", "0")
    put(tmp_path, "sys/devices/system/cpu/cpufreq/topology/core_id", "0")
    assert count_cpus(tmp_path) == 3


def test_without_sysfs_the_interpreter_counts_cpus(tmp_path):
    assert count_cpus(tmp_path) == os.cpu_count()

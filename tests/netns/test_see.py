"""``explain`` and real traffic agree, in each mode; the other commands against a real daemon."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from pyproxy import proxier
from pyproxy.commands.diff import own_ips
from pyproxy.config import Config, IPTables, with_mode
from pyproxy.host import Host
from pyproxy.model import Node
from pyproxy.process import SystemClock
from pyproxy.render import Settings, entries_of
from pyproxy.written import EntryRow
from tests.netns.standin import NODE_IP

pytestmark = pytest.mark.root

LIMIT_SECONDS = 240
WIDTH = 100
# Mode ipvs needs a kernel that has it: see tests/netns/test_ipvs*.
MODES = ("nftables", "iptables", "userspace")


@pytest.fixture(scope="module", params=MODES)
def told(request):
    """What the program found out in a mode."""
    words = [sys.executable, "-m", "tests.netns.agreement", request.param]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as process:
        output, errors = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode and "Unavailable" in errors and not os.environ.get("CI"):
        pytest.skip(errors.strip().splitlines()[-1])
    assert process.returncode == 0, errors
    return json.loads(output) | {"mode": request.param}


def test_explain_and_traffic_agree(told):
    assert told["disagreements"] == []
    assert told["count"] > 400


def test_what_is_not_forwarded_is_counted_by_the_reason(told):
    assert told["refusals"] == {
        "default/fenced": ["denied"],
        "default/nobody-home": ["rejected"],
        "shop/apart": ["dropped"],
        "shop/inner": ["dropped"],
    }


def test_the_kernel_or_our_sockets_hold_what_was_written(told):
    assert len(told["verdicts"]) > 8
    verdicts = {f"{name} {f[0]}": f[1:] for name, found in told["verdicts"].items() for f in found}
    assert {name: found for name, found in verdicts.items() if found[0] != "agrees"} == {}


def test_every_command_succeeds_but_the_wait_for_what_never_comes(told):
    codes = {name: code for name, (code, _, _) in told["commands"].items()}
    assert codes == dict.fromkeys(codes, 0) | {"wait for two": 1}
    errors = told["commands"]["wait for two"][2]
    assert errors == "pyproxy: wait: after 0.3 s port 80/TCP leads to 1, not 2\n"


def test_text_fits_a_terminal(told):
    texts = [output for name, (_, output, _) in told["commands"].items() if name != "json"]
    assert max(len(line) for text in texts for line in text.splitlines()) <= WIDTH


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("apart", "externalTrafficPolicy: Local and no ready endpoint on node-1; endpoints exist"),
        ("inner", "internalTrafficPolicy: Local and no ready endpoint on node-1; endpoints exist"),
        ("nobody", "selector app=typo matches no ready pod"),
        ("fenced", "client 192.0.2.50 is outside loadBalancerSourceRanges 203.0.113.0/24"),
        ("proxied", "198.18.0.22 has ipMode Proxy, so this node leaves it to the load balancer"),
        ("heads", "clusterIP: None (headless)"),
        ("conflicts", "198.18.0.10:80/TCP of default/rival is taken by default/my-nginx-svc"),
    ],
)
def test_the_object_and_field_that_decided_are_named(told, command, sentence):
    assert sentence in " ".join(told["commands"][command][1].split())


def test_wait_sees_a_service_go_and_come_back(told):
    assert [told["waited"][name][0] for name in ("gone", "back")] == [0, 0]


def test_what_is_written_differs_in_nothing_from_what_the_same_files_would_make(told):
    code, output, errors = told["differences"]["same"]
    assert (code, errors) == (0, "")
    assert json.loads(output)["entries"] == []


def test_diff_tells_rules_that_are_no_services(told):
    code, output, _ = told["differences"]["all"]
    entries = json.loads(output)["entries"]
    fixed = {entry["name"] for entry in entries if entry["kind"] == "fixed chain"}
    wanted = {"nftables": {"services"}, "iptables": {"nat KUBE-SERVICES"}, "userspace": set()}
    assert (code, fixed) == (1, wanted[told["mode"]])


def test_diff_tells_the_connections_that_a_stricter_policy_ends(told):
    code, output, _ = told["differences"]["local"]
    found = json.loads(output)
    assert code == 1
    assert {item["service"] for item in found["items"]} == {"default/my-nginx-svc"}
    if told["mode"] == "userspace":  # it relays: the kernel has nothing to keep
        assert found["ending"] == 0
    else:
        assert 0 < found["ending"] < found["flows"]


def test_diff_tells_the_entries_that_would_be_written(told):
    local, moved = (json.loads(told["differences"][name][1]) for name in ("local", "moved"))
    kinds = {"nftables": "service-ips", "iptables": "nat chain", "userspace": "listener"}
    assert kinds[told["mode"]] in {entry["kind"] for entry in local["entries"]}
    assert {entry["change"] for entry in moved["entries"]} == {"added", "removed"}
    text = told["differences"]["text"][1]
    assert max(map(len, text.splitlines())) <= WIDTH


def test_explain_tells_what_somebody_else_has_changed(told):
    code, output, errors = told["tampered"]["explain"]
    assert (code, errors) == (0, "")
    expected = {
        "nftables": "agreed with the kernel",  # nothing was broken
        "iptables": "NOT AS WRITTEN in the kernel, 1 of",
        "userspace": "NOT AS WRITTEN in our sockets, 1 of",
    }
    assert expected[told["mode"]] in output


def test_an_audit_tells_what_differs_and_has_it_put_right(told):
    found, broken = told["tampered"], told["mode"] != "nftables"
    assert found["reported"][0] == found["repaired"][0] == int(broken)
    assert ("differ" in found["reported"][1]) == broken
    assert ("being put right" in found["repaired"][1]) == broken
    assert (found["later"][0], "agree" in found["later"][1]) == (0, True)


def test_a_change_by_somebody_else_is_an_event(told):
    assert told["noticed"]


def test_the_page_of_the_commands_shows_what_they_say_now():
    words = [sys.executable, "-m", "docs.make_commands", "--check"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    if b"Unavailable" in output and not os.environ.get("CI"):
        pytest.skip(output.decode().strip().splitlines()[-1])
    assert (process.returncode, output) == (0, b""), "make commands rewrites it"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("localhost", [True, False])
@pytest.mark.parametrize(
    "ranges",
    [
        pytest.param((), id="all"),
        pytest.param(("primary",), id="the primary"),
        pytest.param(("127.0.0.0/8", "::1/128"), id="loopback only"),
        pytest.param(("192.0.2.0/24", "127.0.0.1/32", "fd00:c0de::/64"), id="and loopback"),
        pytest.param(("198.18.0.1/32", "2001:db8::1/128"), id="one that the node has not"),
        pytest.param(("192.0.2.11/32", "fd00:c0de::11/128", "fe80::/10"), id="and of a link"),
    ],
)
@pytest.mark.parametrize("mode", [*MODES, "ipvs"])
async def test_files_give_the_fixed_part_that_the_mode_has(mode, ranges, localhost, family):
    host = Host()
    await host.read()
    iptables = IPTables(localhost_node_ports=localhost)
    config = with_mode(Config(node_port_addresses=ranges, iptables=iptables), mode)
    node = Node("here", ips=(NODE_IP, "fd00:c0de::11"))
    async with asyncio.TaskGroup() as tasks:
        env = proxier.Env(
            family, config, SystemClock(), tasks, host, node, node.ips, lambda proto, result: None
        )
        has = [EntryRow(*entry) for entry in proxier.load(mode).fixed(env)]
    settings = Settings("here", config, (family,), own_ips=await own_ips())
    (would_have,) = entries_of(mode, {"Node": [node]}, settings).families
    assert list(would_have.entries) == has

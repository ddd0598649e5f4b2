"""Rules as text, from objects that need no cluster."""

import json

import pytest

from pyproxy.config import MODES, Config
from pyproxy.render import RENDERERS, RenderError, Request, Settings, read, request
from tests.manifest_builders import SETTINGS, hand_written, node, pod, resolved, rules_text, service


def test_the_command_keeps_what_is_its_own_and_passes_on_the_rest():
    words = ["-f", "a", "--cluster-cidr", "10.0.0.0/8", "-f", "b", "-v=4", "--mode", "userspace"]
    shared = ["--cluster-cidr", "10.0.0.0/8", "-v=4", "--proxy-mode=userspace"]
    assert request(words) == (Request(("a", "b")), shared)


def test_every_mode_can_be_rendered():
    assert {"auto", *RENDERERS} == set(MODES)


@pytest.mark.parametrize("mode", RENDERERS)
def test_a_mode_renders_the_same_from_objects_in_any_order(mode):
    documents = [
        service(selector={"app": "web"}, type="NodePort"), service("api", ports=[{"port": 81}]),
        pod(1), pod(2, node="elsewhere"), hand_written(of="api"), node("here", "a"),
    ]  # fmt: skip
    settings = Settings("here")
    text = rules_text(mode, resolved(*documents).objects(), settings)
    assert rules_text(mode, resolved(*documents[::-1]).objects(), settings) == text
    assert text.count("10.9.9.9") > 0


@pytest.mark.parametrize("mode", RENDERERS)
def test_without_objects_a_mode_still_has_what_is_always_there(mode):
    assert rules_text(mode, {}, Settings("here")) != ""


def test_beside_another_proxy_filters_look_first_and_leave_the_unknown_to_it():
    cidrs = [
        {"kind": "ServiceCIDR", "metadata": {"name": "c"}, "spec": {"cidrs": ["10.96.0.0/16"]}}
    ]
    objects = resolved(*cidrs, service()).objects()
    alone, beside = (
        rules_text("nftables", objects, Settings("here", Config(service_proxy_name=name), (4,)))
        for name in ("", "canary")
    )
    assert "hook forward priority 0" in alone
    assert "10.96.0.0/16 drop" in alone
    assert "hook forward priority -1" in beside
    assert "10.96.0.0/16 drop" not in beside


def test_a_table_of_listeners_tells_who_is_treated_otherwise():
    web = service(
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        loadBalancerSourceRanges=["192.0.2.0/24"],
        status={"loadBalancer": {"ingress": [{"ip": "203.0.113.9"}]}},
    )
    settings = Settings("here", Config(cluster_cidr="10.244.0.0/16"), (4,))
    text = rules_text("userspace", resolved(web, hand_written()).objects(), settings)
    rows = [" ".join(line.split()) for line in text.splitlines() if "203.0.113.9" in line]
    whom = "in 192.0.2.0/24"
    assert rows == [
        f"default/web 203.0.113.9:80/TCP pods, the node {whom} serve 10.9.9.9:8080",
        f"default/web 203.0.113.9:80/TCP others {whom} silent",
        "default/web 203.0.113.9:80/TCP everybody else silent",
    ]


def test_files_that_name_one_object_twice_are_an_error(tmp_path):
    for name in ("a.yaml", "b.json"):
        (tmp_path / name).write_text(json.dumps(service()))
    with pytest.raises(RenderError) as raised:
        read([str(tmp_path)], SETTINGS)
    first = tmp_path / "a.yaml"
    why = f"document 1: Service default/web: it is already in {first}, document 1"
    assert raised.value.args == (f"{tmp_path / 'b.json'}: {why}",)

"""The demo's judgement: a proxy that does wrong must not get away with it."""

import pytest
import yaml

from pyproxy.demo import what_to_type
from pyproxy.demo.cluster import (
    NODES,
    POD_LABELS,
    PODS,
    ServiceAddress,
    pod_object,
    service_addresses,
    service_objects,
)
from pyproxy.demo.expect import (
    MOST_REQUESTS,
    ORIGINS,
    Case,
    Check,
    Reply,
    Update,
    cases,
    enough,
    explained,
    judged,
    judged_update,
)
from pyproxy.demo.manifests import Manifests
from pyproxy.demo.proxy import arguments, tail
from pyproxy.demo.story import notes
from pyproxy.demo.table import WIDTH, Look, Row, as_json, bar, closing, paragraph, table
from pyproxy.demo.traffic import answer, reply
from pyproxy.model import Address

POD, NODE, OUTSIDE = ORIGINS
SERVICES = service_objects(ipv6=True)
ALL = frozenset(pod.name for pod in PODS)
HERE = frozenset(pod.name for pod in PODS if pod.node == "node-1")
NODE_IP = "192.0.2.11"


def service_address(kind="ClusterIP", *, service="my-nginx-svc", local=False):
    return ServiceAddress(service, kind, Address("10.96.0.10", 80), local)


def case(pods=ALL, *, origin=POD, seen="the node's"):
    return Case(service_address(), origin, frozenset(pods), seen)


def round_of(pods=ALL, *, client=NODE_IP, times=4):
    return [Reply("ok", pod, client) for pod in sorted(pods)] * times


def update(*, failures=(), late=()):
    return Update(900, failures, 5.0, late)


def row(**changes):
    it, replies = case(**changes), round_of()
    return Row(it, tuple(replies), judged(it, replies))


# --- the cluster ----------------------------------------------------------------------------------


def test_the_services_have_the_addresses_that_the_demo_asks():
    assert [
        (f.service, f.kind, str(f.address), f.local) for f in service_addresses(SERVICES, NODES[0])
    ] == [
        ("my-nginx-svc", "ClusterIP", "10.96.0.10:80", False),
        ("my-nginx-svc", "LoadBalancer", "198.18.0.10:80", False),
        ("my-nginx-nodeport", "NodePort", "192.0.2.11:30080", False),
        ("my-nginx", "ClusterIP", "10.96.0.12:8080", False),
        ("my-nginx", "ClusterIP", "[fd00:10:96::12]:8080", False),
        ("my-nginx-local", "LoadBalancer", "198.18.0.11:80", True),
        ("nobody-home", "ClusterIP", "10.96.0.14:80", False),
    ]


def test_without_ipv6_no_address_of_it_is_asked():
    asked = service_addresses(service_objects(ipv6=False), NODES[0])
    assert [f.address.ip for f in asked if ":" in f.address.ip] == []
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("phase", "ready", "terminating"),
    [
        pytest.param("starting", "False", False, id="a new pod is not ready"),
        pytest.param("ready", "True", False, id="a running pod is"),
        pytest.param("terminating", "True", True, id="a terminating pod still passes its probe"),
    ],
)
def test_a_pod_says_its_phase_as_the_api_does(phase, ready, terminating):
    pod = pod_object(PODS[0], phase)
    assert pod["status"]["conditions"] == [{"type": "Ready", "status": ready}]
    assert ("deletionTimestamp" in pod["metadata"]) == terminating


def test_the_manifests_folder_follows_the_pods(tmp_path):
    manifests = Manifests(tmp_path, SERVICES, PODS[:2])
    manifests.put(PODS[2], "starting")
    manifests.remove(PODS[0])
    pods = yaml.safe_load_all((tmp_path / "pods.yaml").read_text())
    assert list(pods) == [pod_object(PODS[1], "ready"), pod_object(PODS[2], "starting")]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["nodes.yaml", "pods.yaml", "services.yaml"]


# --- what is expected -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "origin", "expected"),
    [
        pytest.param(False, OUTSIDE, ALL, id="everybody answers, also from outside"),
        pytest.param(True, OUTSIDE, HERE, id="policy Local: the asked node's pods"),
        pytest.param(True, POD, ALL, id="policy Local does not bind pods"),
        pytest.param(True, NODE, ALL, id="policy Local does not bind the node"),
    ],
)
def test_who_must_answer(local, origin, expected):
    made = cases([service_address("LoadBalancer", local=local)], SERVICES, PODS)
    assert {c.origin: c.pods for c in made}[origin] == expected


def test_a_service_that_selects_no_pod_must_refuse_everywhere():
    made = cases([service_address(service="nobody-home")], SERVICES, PODS)
    assert [(c.origin.name, c.result) for c in made] == [
        ("pod", "refused"),
        ("node", "refused"),
        ("outside", "refused"),
    ]


@pytest.mark.parametrize(
    ("kind", "local", "own"),
    [
        pytest.param("ClusterIP", False, ["pod"], id="cluster IP: pods keep theirs"),
        pytest.param("LoadBalancer", False, [], id="policy Cluster masquerades"),
        pytest.param("NodePort", False, [], id="so for node ports"),
        pytest.param("LoadBalancer", True, ["pod", "outside"], id="Local keeps it"),
        pytest.param("NodePort", True, ["pod", "outside"], id="Local keeps it, node port"),
    ],
)
def test_whose_address_pods_see(kind, local, own):
    made = cases([service_address(kind, local=local)], SERVICES, PODS)
    assert [c.origin.name for c in made if c.seen == "its own"] == own


# --- how many requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("it", "replies", "is_enough"),
    [
        pytest.param(case(), [], False, id="nothing asked yet"),
        pytest.param(case(), round_of(times=3), False, id="too few to show shares"),
        pytest.param(case(), round_of(times=4), True, id="all answered, often enough"),
        pytest.param(case(), round_of(HERE, times=10), False, id="three have not answered yet"),
        pytest.param(case(), round_of(HERE, times=40), True, id="they never will"),
        pytest.param(case(), [Reply("timed out")], True, id="a failure is a failure"),
        pytest.param(case([]), [Reply("refused")] * 2, False, id="refused twice may be luck"),
        pytest.param(case([]), [Reply("refused")] * 3, True, id="refused thrice is not"),
        pytest.param(case([]), [Reply("timed out")], True, id="silence is not refusal"),
    ],
)
def test_when_to_stop_asking(it, replies, is_enough):
    assert enough(it, replies) == is_enough


def test_asking_always_ends():
    assert enough(case(), round_of(HERE, times=MOST_REQUESTS))


# --- the verdict ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("it", "replies", "complaints"),
    [
        pytest.param(case(), round_of(), (), id="all as it should be"),
        pytest.param(case([]), [Reply("refused")] * 3, (), id="refused as it should be"),
        pytest.param(
            case(HERE | {"nginx-4"}), round_of(HERE), ("nginx-4 never answered",), id="one left out"
        ),
        pytest.param(
            case(HERE),
            round_of(HERE | {"nginx-4"}),
            ("nginx-4 answered and should not",),
            id="one too many",
        ),
        pytest.param(
            case([]),
            round_of({"nginx-1"}, times=3),
            ("3 of 3 requests succeeded, not refused",),
            id="answered where nobody is",
        ),
        pytest.param(
            case(),
            [Reply("timed out")],
            ("1 of 1 requests timed out, not ok",),
            id="all silent: not also six pods missing",
        ),
        pytest.param(
            case(),
            [*round_of(), Reply("reset")],
            ("1 of 25 requests reset, not ok",),
            id="one failure among many",
        ),
        pytest.param(
            case(seen="its own"),
            round_of(),
            ("pods saw the client as 192.0.2.11 and not as its own address",),
            id="masqueraded without need",
        ),
        pytest.param(
            case(),
            round_of(client="10.244.1.100"),
            ("pods saw the client as 10.244.1.100 and not as the node's address",),
            id="not masqueraded",
        ),
        pytest.param(
            case(seen="its own"), round_of(client="10.244.1.100"), (), id="the pod's own address"
        ),
        pytest.param(
            case(), round_of(client="10.244.1.1"), (), id="the node's address to its pods"
        ),
    ],
)
def test_the_verdict_names_what_is_wrong(it, replies, complaints):
    assert judged(it, replies).complaints == complaints


@pytest.mark.parametrize(
    ("result", "complaints"),
    [
        pytest.param(update(), [(), ()], id="nothing failed"),
        pytest.param(
            update(failures=("reset", "refused", "reset")),
            [("1 of 900 requests refused", "2 of 900 requests reset"), ()],
            id="failures are counted by kind",
        ),
        pytest.param(
            update(late=("nginx-7",)), [(), ("nginx-7 was ready and got none",)], id="one unused"
        ),
    ],
)
def test_a_rolling_update_may_lose_no_request(result, complaints):
    assert [check.complaints for check in judged_update(result)] == complaints


def test_the_refusal_is_explained_by_service_and_selector():
    assert explained(SERVICES, service_addresses(SERVICES, NODES[0])) == (
        "nobody-home (10.96.0.14:80) refuses connections, as it should: no pod matches its"
        " selector app=typo (the pods are labelled app=my-nginx).",
    )


def test_a_service_with_pods_needs_no_explanation():
    matching = [s for s in SERVICES if s["spec"]["selector"] == POD_LABELS]
    assert explained(matching, service_addresses(matching, NODES[0])) == ()


# --- the table ------------------------------------------------------------------------------------


def test_the_table_is_aligned_and_repeats_nothing():
    lines = table([row(), row(origin=OUTSIDE)], ["nginx-1", "nginx-2"], Look())
    assert lines == [
        "  service       address        from     result  1    2     pods see",
        "✓ my-nginx-svc  10.96.0.10:80  pod      24 ok   ████ ████  the node",
        "✓                              outside  24 ok   ████ ████  the node",
    ]


def test_a_wrong_row_is_marked_and_shows_the_address_that_was_seen():
    line = table([row(seen="its own")], ["nginx-1"], Look())[1]
    assert line == "✗ my-nginx-svc  10.96.0.10:80  pod   24 ok   ████  192.0.2.11"


def test_a_terminal_without_block_characters_gets_ascii():
    lines = table([row()], ["nginx-1", "nginx-9"], Look(blocks=False))
    assert lines[1] == "+ my-nginx-svc  10.96.0.10:80  pod   24 ok   #### .     the node"
    assert "".join(lines).isascii()


def test_colour_changes_no_letter():
    plain, coloured = (closing([Check("it")], Look(colour=c)) for c in (False, True))
    assert coloured == [f"\x1b[32m{plain[0]}\x1b[0m"]


@pytest.mark.parametrize(
    ("count", "most", "text"),
    [
        pytest.param(0, 9, "·", id="none"),
        pytest.param(9, 9, "████", id="most"),
        pytest.param(3, 6, "██", id="half"),
        pytest.param(5, 6, "███▍", id="eighths"),
        pytest.param(1, 500, "▏", id="few are not none"),
    ],
)
def test_a_bar_is_as_long_as_the_share(count, most, text):
    assert bar(count, most, Look()) == text


def test_all_lines_are_short():
    asked = service_addresses(SERVICES, NODES[0])
    rows = [
        Row(c, tuple(replies), judged(c, replies))
        for c in cases(asked, SERVICES, PODS)
        for replies in [round_of(c.pods, client="2001:db8::50", times=16)]
    ]
    text = [*table(rows, [pod.name for pod in PODS], Look())]
    text += [line for note in notes() for line in paragraph(note)]
    assert max(map(len, text)) <= WIDTH <= 110


def test_the_last_line_counts_the_checks():
    assert closing([Check("one"), Check("two")], Look()) == ["all 2 checks passed"]


def test_the_last_lines_list_what_was_wrong():
    assert closing([Check("one"), Check("two", ("so", "and so"))], Look()) == [
        "1 of 2 checks failed:",
        "✗ two",
        "    so",
        "    and so",
    ]


def test_json_has_the_verdict_and_the_counts():
    wrong = row(seen="its own")
    result = as_json("userspace", [wrong], update(), [wrong.check])
    assert result["ok"] is False
    assert result["rows"] == [
        {
            "service": "my-nginx-svc",
            "kind": "ClusterIP",
            "address": "10.96.0.10:80",
            "from": "pod",
            "results": {"ok": 24},
            "answered_by": dict.fromkeys(sorted(ALL), 4),
            "clients_seen": ["192.0.2.11"],
            "complaints": wrong.check.complaints,
        }
    ]


# --- what is said to programs ---------------------------------------------------------------------


def test_a_reply_says_who_answered_and_whom_it_saw():
    assert reply(answer("nginx-1", "fd00::1")) == Reply("ok", "nginx-1", "fd00::1")


@pytest.mark.parametrize(
    ("received", "result"),
    [
        pytest.param(b"", "closed", id="nothing"),
        pytest.param(b"SSH-2.0-x\r\n", "no HTTP", id="another protocol"),
        pytest.param(b"HTTP/1.1 503 No\r\n\r\nnginx-1 saw x", "no HTTP", id="an error"),
        pytest.param(answer("nginx-1", "192.0.2.50")[:-14], "cut short", id="half an answer"),
    ],
)
def test_anything_else_is_not_ok(received, result):
    assert reply(received) == Reply(result)


def test_pyproxy_is_told_what_the_cluster_is(tmp_path):
    assert arguments(tmp_path, "userspace", ipv6=True) == (
        "--manifests", str(tmp_path),
        "--hostname-override", "node-1",
        "--proxy-mode", "userspace",
        "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48",
        "--healthz-bind-address", "127.0.0.1:10256",
        "--metrics-bind-address", "127.0.0.1:10249",
    )  # fmt: skip


def test_the_log_is_quoted_from_its_end(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    assert tail(log).splitlines()[-1] == "    line 99"
    assert len(tail(log).splitlines()) == 16


@pytest.mark.parametrize(
    ("as_user", "command"),
    [
        pytest.param(
            False, 'nsenter --net=/proc/7/root/run/netns/$n "$@"', id="root enters the network"
        ),
        pytest.param(
            True,
            'nsenter -t 7 -U --preserve-credentials --net=/proc/7/root/run/netns/$n "$@"',
            id="a user first becomes the namespace's root",
        ),
    ],
)
def test_what_to_type_fits_the_user(tmp_path, as_user, command):
    lines = what_to_type(7, tmp_path, as_user=as_user)
    assert f"  at() {{ n=$1; shift; {command}; }}" in lines

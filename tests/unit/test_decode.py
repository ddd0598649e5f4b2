import json
from pathlib import Path

import pytest

from pyproxy.kube.decode import (
    DecodeError,
    decode_event,
    decode_list,
    decode_object,
    decode_refusal,
)
from pyproxy.kube.events import (
    Bookmark,
    Changed,
    Deleted,
    Expired,
    Failed,
    Page,
    Refused,
    Skipped,
    Unreadable,
)
from pyproxy.model import ObjectName, Service

RECORDINGS = Path(__file__).parent.parent / "data" / "recordings"
WEB = ObjectName("default", "web")

GOOD = {"metadata": {"name": "web", "resourceVersion": "7"}, "spec": {"clusterIP": "10.96.0.1"}}
BAD = {"metadata": {"name": "bad", "resourceVersion": "8"}, "spec": {"ports": [{"port": 0}]}}
BAD_TEXT = "Service bad: spec.ports[0].port: 0 is not a port"


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        pytest.param(
            {
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {"ports": [{"port": 80}, {"port": 81}, {"port": 70000}]},
            },
            "Service default/web: spec.ports[2].port: 70000 is not a port",
            id="a number too large",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": {"ports": [{"port": "http"}]}},
            'Service web: spec.ports[0].port: "http" is not a port',
            id="a word",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": {"ports": [{"name": "http"}]}},
            "Service web: spec.ports[0].port: it is missing",
            id="a field is missing",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 1, "protocol": "ICMP"}]}},
            'Service web: spec.ports[0].protocol: "ICMP" is not TCP, UDP or SCTP',
            id="a protocol",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": {"clusterIP": {}}},
            "Service web: spec.clusterIP: an object is not a string",
            id="an object",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": [1]},
            "Service web: spec: a list is not an object",
            id="a list",
        ),
        pytest.param(
            {"metadata": {"name": "web"}, "spec": {"clusterIPs": "x" * 99}},
            f'Service web: spec.clusterIPs: "{"x" * 59}... is not a list',
            id="a long text is cut",
        ),
        pytest.param(
            {"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}, "spec": {}},
            "Service: metadata.name: it is missing",
            id="no name",
        ),
        pytest.param(
            {"metadata": {"name": "w", "annotations": {"pyproxy.io/weights": 1}}, "spec": {}},
            "Service w: metadata.annotations.pyproxy.io/weights: it is not a string",
            id="a key with dots",
        ),
        pytest.param([], "Service: a list is not an object", id="not an object at all"),
        pytest.param(None, "Service: null is not an object", id="nothing"),
    ],
)
def test_an_error_names_object_and_field_and_what_is_there(mapping, text):
    with pytest.raises(DecodeError) as caught:
        decode_object("Service", mapping)
    assert str(caught.value) == text


# --- events and lists -----------------------------------------------------------------------------


def event(kind, obj):
    return decode_event(json.dumps({"type": kind, "object": obj}).encode(), "Service")


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED"])
def test_an_object_that_is_new_or_different_has_changed(kind):
    assert event(kind, GOOD) == Changed(
        "7", Service(WEB, cluster_ip4="10.96.0.1", resource_version="7")
    )


def test_of_a_deleted_object_only_the_name_matters():
    assert event("DELETED", BAD) == Deleted("8", ObjectName("default", "bad"))


@pytest.mark.parametrize(
    ("annotations", "is_complete"),
    [
        pytest.param(None, False, id="null"),
        pytest.param({"other": "x"}, False, id="another annotation"),
        pytest.param({"k8s.io/initial-events-end": "true"}, True, id="the end of a list"),
    ],
)
def test_a_bookmark_may_end_a_list(annotations, is_complete):
    metadata = {"resourceVersion": "9", "annotations": annotations}
    assert event("BOOKMARK", {"metadata": metadata}) == Bookmark("9", is_complete)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        pytest.param({"code": 410, "message": "old"}, Expired("old"), id="code"),
        pytest.param({"reason": "Expired"}, Expired(""), id="reason"),
        pytest.param({"code": 500, "message": "no"}, Failed(500, "no"), id="anything else"),
    ],
)
def test_an_error_event_is_expired_or_failed(status, expected):
    assert event("ERROR", status) == expected


def test_an_unreadable_object_still_tells_how_far_the_server_is():
    assert event("ADDED", BAD) == Unreadable("8", BAD_TEXT)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param(b"nonsense", "Service: the server sent what is not JSON", id="not JSON"),
        pytest.param(
            b'{"type":"ADDED","obj', "Service: the server sent what is not JSON", id="cut"
        ),
        pytest.param(b"[]", "Service: it is not an object", id="not an event"),
        pytest.param(b'{"type":"ADDED"}', "Service: object: it is missing", id="no object"),
        pytest.param(
            b'{"type":"NEW","object":{}}',
            "Service: a watch event of the unknown type NEW",
            id="an unknown type",
        ),
    ],
)
def test_a_line_that_is_no_event_is_unreadable(line, text):
    unreadable = decode_event(line, "Service")
    assert (unreadable.version, unreadable.error[: len(text)]) == ("", text)


def test_a_bad_object_in_a_list_is_an_error_and_stops_no_other():
    other = {"metadata": {"name": "other", "namespace": "x"}, "spec": {}}
    foreign = {
        "metadata": {"name": "f", "labels": {"service.kubernetes.io/service-proxy-name": ""}}
    }
    items = [GOOD, BAD, {**foreign, "spec": {}}, other]
    body = json.dumps({"metadata": {"resourceVersion": "9", "continue": "t"}, "items": items})
    assert decode_list(body.encode(), "Service") == Page(
        "9",
        "t",
        (
            Service(WEB, cluster_ip4="10.96.0.1", resource_version="7"),
            Service(ObjectName("x", "other")),
        ),
        (BAD_TEXT,),
    )


def test_a_list_may_be_null():
    assert decode_list(b'{"metadata":{},"items":null}', "Node") == Page("", "", (), ())


def test_what_is_no_list_raises():
    with pytest.raises(DecodeError, match="list of Node objects: Expected"):
        decode_list(b"[]", "Node")


@pytest.mark.parametrize(
    ("body", "retry_after", "refused"),
    [
        pytest.param(
            b'{"message":"m","reason":"NotFound","code":404}',
            0.0,
            Refused(418, "m", "NotFound"),
            id="a Status",
        ),
        pytest.param(
            b'{"message":"m","reason":"Timeout","details":{"causes":'
            b'[{"reason":"ResourceVersionTooLarge"}],"retryAfterSeconds":3}}',
            1.0,
            Refused(418, "m", "ResourceVersionTooLarge", 3.0),
            id="the cause counts more, and the longer wait",
        ),
        pytest.param(b"bad gateway\n<html>", 2.0, Refused(418, "bad gateway", "", 2.0), id="text"),
        pytest.param(b"", 0.0, Refused(418), id="nothing"),
    ],
)
def test_a_refusal_is_read_from_its_body(body, retry_after, refused):
    assert decode_refusal(418, body, retry_after) == refused


# --- what a real server sent ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "kind", "counts"),
    [
        ("watch-services.jsonl", "Service", {Changed: 16, Skipped: 1, Deleted: 1, Bookmark: 2}),
        (
            "watch-endpointslices.jsonl",
            "EndpointSlice",
            {Changed: 168, Skipped: 17, Deleted: 1, Bookmark: 2},
        ),
        ("watch-nodes.jsonl", "Node", {Changed: 4, Bookmark: 2}),
        ("watch-node-a.jsonl", "Node", {Changed: 2, Bookmark: 2}),
        ("watch-servicecidrs.jsonl", "ServiceCIDR", {Changed: 1, Bookmark: 2}),
    ],
)
def test_a_recorded_watch_is_understood_completely(file, kind, counts):
    events = [decode_event(line, kind) for line in (RECORDINGS / file).read_bytes().splitlines()]
    found = {shape: sum(isinstance(e, shape) for e in events) for shape in counts}
    assert (found, len(events)) == (counts, sum(counts.values()))
    assert [e.obj.warnings for e in events if getattr(getattr(e, "obj", 0), "warnings", ())] == []


@pytest.mark.parametrize(
    ("file", "kind", "count", "has_more"),
    [
        ("list-services.json", "Service", 3, True),
        ("list-endpointslices.json", "EndpointSlice", 11, False),
    ],
)
def test_a_recorded_list_is_understood_completely(file, kind, count, has_more):
    page = decode_list((RECORDINGS / file).read_bytes(), kind)
    assert (page.version, bool(page.continue_token)) == ("852", has_more)
    assert (len(page.objects), page.errors) == (count, ())


def test_recorded_errors_are_understood():
    gone = (RECORDINGS / "error-410-gone.json").read_bytes()
    absent = (RECORDINGS / "error-404.json").read_bytes()
    assert decode_event(gone, "Service") == Expired("too old resource version: 1 (7)")
    assert decode_refusal(404, absent) == Refused(404, 'services "none" not found', "NotFound")


def test_a_recorded_rolling_update_shows_draining_endpoints():
    lines = (RECORDINGS / "watch-endpointslices.jsonl").read_bytes().splitlines()
    draining = {
        endpoint.pod
        for event in (decode_event(line, "EndpointSlice") for line in lines)
        if isinstance(event, Changed)
        for endpoints in event.obj.endpoints.values()
        for endpoint in endpoints
        if endpoint.terminating and not endpoint.ready
    }
    assert len(draining) >= 6

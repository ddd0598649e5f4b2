import pytest

from pyproxy.kube.events import (
    Absent,
    Bookmark,
    Changed,
    Closed,
    Deleted,
    Expired,
    Failed,
    Page,
    Refused,
    Skipped,
    Unreachable,
    Unreadable,
)
from pyproxy.kube.watch import ListPage, Watch, WatchMachine
from pyproxy.model import Node, Remove, Replace, ServiceCIDR, Upsert
from tests.builders import service

WEB, API = service("web"), service("api")
STREAMED_LIST = Watch("", send_initial_events=True)
FIRST_PAGE = ListPage(500)


def machine(*, streaming=True, random=1.0):
    """A machine that waits as long as it ever would."""
    return WatchMachine("Service", streaming=streaming, random=lambda: random)


def synced(version="7", **options):
    """A machine that has asked for a list and got it."""
    made = machine(**options)
    made.next_request()
    made.receive(Bookmark(version, is_complete=True))
    return made


def tell(made, *events):
    """The changes that these events mean."""
    changes = [made.receive(event) for event in events]
    return [change for change in changes if change is not None]


# --- lists --------------------------------------------------------------------------------------


def test_a_streamed_list_is_one_replacement_and_goes_on_as_a_watch():
    made = machine()
    assert made.next_request() == STREAMED_LIST
    assert tell(made, Changed("3", WEB), Changed("5", API), Bookmark("7", is_complete=True)) == [
        Replace("Service", (WEB, API))
    ]
    assert tell(made, Changed("8", WEB)) == [Upsert("Service", WEB)]
    made.ended(Closed())
    assert made.next_request() == Watch("8")


def test_what_is_taken_back_before_the_end_of_a_list_is_not_in_it():
    made = machine()
    made.next_request()
    changes = tell(
        made,
        Changed("3", WEB),
        Changed("4", API),
        Deleted("5", WEB.name),
        Skipped("6", API.name, "relabelled"),
        Bookmark("7", is_complete=True),
    )
    assert changes == [Replace("Service", ())]


def test_a_list_that_is_cut_begins_anew():
    made = machine()
    made.next_request()
    tell(made, Changed("3", WEB))
    made.ended(Closed())
    assert made.next_request() == STREAMED_LIST
    assert tell(made, Changed("5", API), Bookmark("7", is_complete=True)) == [
        Replace("Service", (API,))
    ]


def test_pages_are_one_replacement_and_asked_for_without_a_wait():
    made = machine(streaming=False)
    assert made.next_request() == FIRST_PAGE
    assert tell(made, Page("7", "more", (WEB,))) == []
    assert made.ended(Closed()) == 0.0
    assert made.next_request() == ListPage(500, "more")
    assert tell(made, Page("7", "", (API,))) == [Replace("Service", (WEB, API))]
    assert made.ended(Closed()) == 0.0
    assert made.next_request() == Watch("7")


def test_a_page_that_did_not_come_is_asked_for_again():
    made = machine(streaming=False)
    made.next_request()
    tell(made, Page("7", "more", (WEB,)))
    made.ended(Closed())
    made.next_request()
    made.ended(Unreachable("timeout"))
    assert made.next_request() == ListPage(500, "more")


@pytest.mark.parametrize("status", [400, 410])
def test_an_expired_page_makes_the_list_begin_anew_and_in_one_piece(status):
    made = machine(streaming=False)
    made.next_request()
    tell(made, Page("7", "more", (WEB,)))
    made.ended(Closed())
    made.next_request()
    made.ended(Refused(status))
    assert made.next_request() == ListPage(0)
    assert tell(made, Page("9", "", (API,))) == [Replace("Service", (API,))]


@pytest.mark.parametrize(
    "give_up",
    [
        pytest.param(lambda made: made.ended(Refused(422)), id="refused as invalid"),
        pytest.param(lambda made: made.ended(Refused(400)), id="refused as bad"),
        pytest.param(lambda made: made.ended(Closed(15.0)), id="left open in silence"),
        pytest.param(lambda made: made.receive(Bookmark("9")), id="a bookmark, but not the end"),
    ],
)
def test_a_server_that_cannot_stream_lists_is_asked_for_pages(give_up):
    made = machine()
    made.next_request()
    tell(made, Changed("3", WEB))
    give_up(made)
    assert made.next_request() == FIRST_PAGE


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda made: made.ended(Closed(1.0)), id="cut"),
        pytest.param(
            lambda made: (made.receive(Failed(500, "etcd")), made.ended(Closed())), id="an error"
        ),
    ],
)
def test_a_list_that_is_cut_three_times_is_asked_for_in_pages(fail):
    made = machine()
    requests = []
    for _ in range(4):
        requests.append(made.next_request())
        fail(made)
    assert requests == [STREAMED_LIST, STREAMED_LIST, STREAMED_LIST, FIRST_PAGE]


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(Unreachable("no route"), id="no server"),
        pytest.param(Refused(401), id="not known yet"),
        pytest.param(Refused(403), id="not allowed yet"),
        pytest.param(Refused(503), id="starting"),
    ],
)
def test_a_server_in_trouble_is_asked_for_the_same_again(outcome):
    made = machine()
    for _ in range(5):
        assert made.next_request() == STREAMED_LIST
        made.ended(outcome)


def test_objects_without_a_namespace_are_told_apart_by_name():
    made = WatchMachine("Node", random=lambda: 0.0)
    made.next_request()
    objects = (Node("a"), ServiceCIDR("b", ()))
    events = [Changed("1", obj) for obj in objects]
    assert tell(made, *events, Bookmark("7", is_complete=True)) == [Replace("Node", objects)]


# --- watches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        pytest.param(Changed("8", WEB), [Upsert("Service", WEB)], id="changed"),
        pytest.param(Deleted("8", WEB.name), [Remove("Service", WEB.name)], id="deleted"),
        pytest.param(
            Skipped("8", WEB.name, "relabelled"), [Remove("Service", WEB.name)], id="not ours now"
        ),
        pytest.param(Bookmark("8"), [], id="a bookmark"),
        pytest.param(Unreadable("8", "no port"), [], id="unreadable"),
    ],
)
def test_an_event_is_a_change_and_where_the_next_watch_resumes(event, changes):
    made = synced("7")
    assert tell(made, event) == changes
    made.ended(Closed())
    assert made.next_request() == Watch("8")


def test_an_unreadable_line_without_a_version_moves_nothing():
    made = synced("7")
    tell(made, Unreadable("", "not JSON"))
    made.ended(Closed())
    assert made.next_request() == Watch("7")


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(lambda made: made.receive(Expired("compacted")), id="an error event"),
        pytest.param(lambda made: made.ended(Refused(410, "gone")), id="a status"),
        pytest.param(lambda made: made.ended(Refused(400, "bad version")), id="not its version"),
        pytest.param(
            lambda made: made.ended(Refused(504, "", "ResourceVersionTooLarge")),
            id="a version of the future: restored from a backup",
        ),
    ],
)
def test_a_version_the_server_does_not_have_means_a_new_list(end):
    made = synced()
    made.next_request()
    end(made)
    assert made.next_request() == STREAMED_LIST


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503, 504])
def test_a_refusal_that_is_not_about_the_version_keeps_it(status):
    made = synced("7")
    made.next_request()
    made.ended(Refused(status))
    assert made.next_request() == Watch("7")


def test_a_watch_that_fails_three_times_without_an_event_means_a_new_list():
    made = synced("7")
    requests = []
    for _ in range(4):
        requests.append(made.next_request())
        tell(made, Failed(500, "etcd"))
        made.ended(Closed())
    assert requests == [Watch("7"), Watch("7"), Watch("7"), STREAMED_LIST]


def test_any_event_between_failures_keeps_the_version():
    made = synced("7")
    for version in ("8", "9", "10", "11", "12"):
        made.next_request()
        tell(made, Bookmark(version), Failed(500, "etcd"))
        made.ended(Closed())
    assert made.next_request() == Watch("12")


@pytest.mark.parametrize(
    ("event", "is_useless"),
    [
        pytest.param(Changed("8", WEB), False, id="an object"),
        pytest.param(Unreadable("8", "no port"), False, id="unreadable"),
        pytest.param(Expired("compacted"), True, id="expired"),
        pytest.param(Failed(500, "etcd"), True, id="failed"),
        pytest.param(Absent(), True, id="absent"),
    ],
)
def test_after_an_error_the_rest_of_an_answer_is_useless(event, is_useless):
    made = synced()
    tell(made, event)
    assert made.is_useless is is_useless
    made.next_request()
    assert not made.is_useless


def test_an_api_that_is_absent_has_no_objects_and_is_asked_for_again_in_ten_minutes():
    made = synced()
    made.next_request()
    assert tell(made, Absent()) == [Replace("Service", ())]
    assert made.ended(Closed()) == 600.0
    assert made.next_request() == STREAMED_LIST


# --- waits --------------------------------------------------------------------------------------


def waits(made, *outcomes):
    found = []
    for outcome in outcomes:
        made.next_request()
        found.append(made.ended(outcome))
    return found


def test_each_silent_end_doubles_the_wait_up_to_a_limit():
    assert waits(machine(), *[Unreachable("no route")] * 10) == [
        0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0, 10.0, 10.0,
    ]  # fmt: skip


def test_a_watch_that_is_taken_and_closed_ends_the_trouble_of_before():
    made = synced()
    waits(made, *[Unreachable("no route")] * 8)
    assert waits(made, Closed(), Closed(), Closed()) == [0.8, 0.8, 0.8]


def test_chance_takes_up_to_half_of_a_wait():
    assert waits(machine(random=0.0), Unreachable("no route")) == [0.2]


def test_an_event_makes_the_next_wait_short_again():
    made = synced()
    waits(made, *[Unreachable("no route")] * 5)
    made.next_request()
    tell(made, Bookmark("8"))
    assert made.ended(Closed()) == 0.2
    assert waits(made, Unreachable("no route")) == [0.4]


def test_a_watch_that_lasted_was_no_failure_though_nothing_happened():
    made = synced()
    assert waits(made, Closed(300.0), Closed(300.0), Closed(300.0)) == [0.2, 0.2, 0.2]


def test_a_server_that_lists_and_forgets_at_once_is_not_asked_in_a_hurry():
    made = machine()
    found = []
    for _ in range(4):
        made.next_request()
        tell(made, Bookmark("7", is_complete=True), Expired("compacted"))
        found.append(made.ended(Closed()))
    assert found == [0.4, 0.8, 1.6, 3.2]


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        pytest.param(0.0, 0.4, id="not told"),
        pytest.param(0.1, 0.4, id="sooner than we would"),
        pytest.param(17.0, 17.0, id="later than we would"),
        pytest.param(1e9, 60.0, id="not for ever"),
    ],
)
def test_a_server_that_says_when_to_come_back_is_obeyed(retry_after, seconds):
    assert waits(machine(), Refused(429, retry_after_seconds=retry_after)) == [seconds]


def test_a_machine_knows_its_kind():
    assert machine().kind == "Service"

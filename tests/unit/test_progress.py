"""How far a plan is written: by owner, and up to which version."""

from pyproxy.progress import NO_SYNC, Progress
from pyproxy.report import SyncReport
from tests.builders import owner

WEB, API = owner("web"), owner("api")
PORTS = {WEB: None, API: None}  # only who is there counts


def report(at, **fields):
    return SyncReport(mode="nftables", family=4, full=False, finished_at=at, seconds=0.0, **fields)


def begun():
    progress = Progress()
    progress.noted({WEB, API})
    progress.planned({WEB, API}, {"Service": 7})
    progress.synced(report(100.0), PORTS)
    return progress


def test_nothing_is_programmed_before_the_first_sync():
    progress = Progress()
    assert (progress.error, progress.state(WEB), progress.since(WEB)) == (NO_SYNC, "pending", None)
    assert progress.written({"Service": 7}) == {}


def test_an_owner_is_programmed_since_its_plan_was_written():
    progress = begun()
    progress.noted({API})
    assert (progress.state(WEB), progress.state(API)) == ("programmed", "pending")
    progress.planned({API}, {"Service": 9})
    progress.synced(report(200.0), PORTS)
    assert (progress.since(WEB), progress.since(API)) == (100.0, 200.0)
    assert progress.synced_at == 200.0


def test_an_owner_whose_plan_stayed_as_it_was_keeps_its_moment():
    progress = begun()
    progress.noted({API})
    progress.planned(set(), {"Service": 9})
    progress.synced(report(200.0), PORTS)
    assert progress.since(API) == 100.0


def test_a_change_that_comes_during_a_sync_is_still_to_be_written():
    progress = begun()
    progress.planned({WEB}, {"Service": 8})
    progress.noted({WEB})
    progress.synced(report(200.0), PORTS)
    assert progress.state(WEB) == "pending"
    assert progress.written({"Service": 9}) == {"Service": 8}


def test_after_a_failure_nothing_is_certain_and_versions_stay():
    progress = begun()
    progress.planned({WEB}, {"Service": 8})
    progress.synced(report(200.0, error="no"), PORTS)
    assert (progress.state(API), progress.since(API), progress.error) == ("pending", None, "no")
    assert progress.written({"Service": 8}) == {"Service": 7}
    progress.planned(set(), {"Service": 8})
    progress.synced(report(300.0), PORTS)
    assert (progress.since(WEB), progress.since(API)) == (300.0, 100.0)


def test_versions_that_concern_no_owner_are_written_at_once():
    assert begun().written({"Service": 12}) == {"Service": 12}


def test_what_is_refused_is_not_programmed():
    progress = begun()
    progress.planned({WEB}, {})
    progress.synced(report(200.0, refused={WEB: ("taken",)}), PORTS)
    assert (progress.state(WEB), progress.refusals(WEB)) == ("refused", ("taken",))
    assert (progress.state(API), progress.refusals(API)) == ("programmed", ())


def test_an_owner_that_leaves_is_known_until_that_is_written():
    progress = begun()
    progress.noted({WEB})
    progress.planned({WEB}, {})
    assert progress.awaited() == {WEB}
    progress.synced(report(200.0), {API: None})
    assert progress.awaited() == set()

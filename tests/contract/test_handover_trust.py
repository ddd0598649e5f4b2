"""Whom a successor trusts, and where it meets its predecessor."""

import os
import socket
from contextlib import closing, contextmanager
from types import SimpleNamespace

import pytest

from pyproxy.proxier import _handover, _succession
from pyproxy.proxier._given import Entrances
from pyproxy.proxier._handover import Handover, predecessor
from pyproxy.proxier._succession import (
    RUN,
    Succession,
    is_abandoned,
    meeting_place,
    predecessors,
    remove_abandoned,
)

SOMEBODY = 12345


def as_user(uid):
    """The module ``os`` of a process of this user."""
    return SimpleNamespace(**vars(os) | {"geteuid": lambda: uid})


@contextmanager
def listening(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(path))
        server.listen(1)
        yield


class Nobody:
    """Has nothing to go on with."""

    def admit(self):
        pass


def opened(path):
    handover = Handover(path, lambda: None, list, lambda: None)
    handover.open()
    return handover


@pytest.fixture
def place(tmp_path):
    (tmp_path / "pyproxy").mkdir(mode=0o700)
    return tmp_path / "pyproxy" / "userspace.sock"


async def test_who_waits_in_a_folder_of_ours_is_found(tmp_path):
    place = tmp_path / "new" / "userspace.sock"
    assert predecessors(place) == {}
    with closing(opened(place)):
        (found,) = predecessors(place).values()
        found.close()


async def test_what_another_user_listens_at_is_not_asked(place, monkeypatch, caplog):
    with listening(place):
        predecessor(place).close()
        monkeypatch.setattr(_handover, "os", as_user(SOMEBODY))
        assert predecessor(place) is None
    assert [record.message for record in caplog.records] == ["a stranger listens"]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777], ids=oct)
async def test_a_folder_that_others_write_to_is_not_used(place, mode, caplog):
    place.parent.chmod(mode)
    with pytest.raises(PermissionError, match="other users may write"):
        opened(place)
    with listening(place):
        assert predecessors(place) == {}
    assert [record.message for record in caplog.records] == ["no predecessor is looked for"]
    assert list(place.parent.iterdir()) == [place]


async def test_a_folder_of_another_user_is_not_used(place, monkeypatch):
    monkeypatch.setattr(_handover, "os", as_user(SOMEBODY))
    with pytest.raises(PermissionError, match=f"the folder is user {os.geteuid()}'s"):
        opened(place)
    assert predecessors(place) == {}


@pytest.mark.parametrize(
    ("uid", "runtime_dir", "folder"),
    [
        pytest.param(0, "/run/user/0", str(RUN), id="root"),
        pytest.param(SOMEBODY, "/run/user/1", "/run/user/1/pyproxy", id="a session's"),
        pytest.param(SOMEBODY, "", f"/tmp/pyproxy-{SOMEBODY}", id="no session"),
    ],
)
def test_each_user_has_a_folder(uid, runtime_dir, folder, monkeypatch):
    monkeypatch.setattr(_succession, "os", as_user(uid))
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime_dir)
    assert str(meeting_place("", 4).parent) == folder


async def test_a_start_removes_the_places_that_nobody_in_other_namespaces_has_any_more(place):
    folder, own = place.parent, place.with_name("userspace-ipv4-77.sock")
    abandoned = ["userspace-ipv4-5.sock", "userspace-ipv6-5.sock", "userspace-ipv4-5.3.sock"]
    kept = ["userspace-ipv4-77.2.sock", "others.sock"]  # a worker of ours, and another program's
    for name in [*abandoned, *kept]:
        with listening(folder / name):
            pass
    (folder / "userspace-ipv4-8.sock").write_text("no socket")
    alive = folder / "userspace-ipv4-6.sock"
    handover = Handover(own, Entrances, list, lambda: None)
    with listening(alive), closing(handover):
        before = alive.stat().st_ino
        await Succession(handover).begin(Nobody())
        assert alive.stat().st_ino == before
        predecessor(alive).close()
        left = {path.name for path in folder.iterdir()}
    assert left == {*kept, own.name, alive.name, "userspace-ipv4-8.sock"}


def test_a_place_that_is_bound_and_does_not_listen_yet_is_not_abandoned(place):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(place))
        assert not is_abandoned(place)
    assert is_abandoned(place)


def test_a_process_that_lives_hears_nothing_of_it(place):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(str(place))
        server.listen(1)
        server.setblocking(False)
        assert not is_abandoned(place)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_who_starts_elsewhere_with_the_same_pid_keeps_the_name_it_has_bound(tmp_path):
    """In containers that share the folder, each is process 1."""
    abandoned, own = tmp_path / "userspace-ipv4-5.sock", tmp_path / "userspace-ipv4-7.sock"
    with listening(abandoned):
        pass
    starting = abandoned.with_suffix(f".{os.getpid()}")
    with listening(starting):
        remove_abandoned(own)
        assert not abandoned.exists()
        assert starting.exists()

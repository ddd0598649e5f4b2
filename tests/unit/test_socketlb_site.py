import pytest

from pyproxy.config import Config, Userspace
from pyproxy.proxier import _socketlb_site
from pyproxy.proxier._socketlb_site import Mount, Off, chosen_cgroup, mounts, pins, remove_pins

LINE = "30 24 0:26 {root} {at} rw,nosuid shared:9 - {kind} {kind} rw,nsdelegate\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose root cgroup and bpf file system are folders; return a way to say what is."""
    root, bpffs = tmp_path / "cgroup", tmp_path / "bpf fs"
    root.mkdir()
    bpffs.mkdir()
    monkeypatch.setattr(_socketlb_site, "MOUNTS", tmp_path / "mountinfo")
    monkeypatch.setattr(_socketlb_site, "HOST_ONLY", root)

    def mounted(*kinds, root_of="/"):
        places = {"cgroup2": root, "bpf": bpffs, "proc": "/proc"}
        lines = [
            LINE.format(kind=kind, root=root_of, at=str(places[kind]).replace(" ", "\\040"))
            for kind in kinds
        ]
        (tmp_path / "mountinfo").write_text("".join(lines))

    mounted("proc", "cgroup2", "bpf")
    return mounted


def test_mounts_are_read_as_the_kernel_writes_them(machine, tmp_path):
    assert Mount("bpf", "/", tmp_path / "bpf fs") in list(mounts())


def test_by_itself_it_is_the_root_of_cgroup_v2(machine, tmp_path):
    assert chosen_cgroup(Config()) == tmp_path / "cgroup"


def test_a_cgroup_that_is_given_is_taken(machine):
    config = Config(userspace=Userspace(cgroup="/sys/fs/cgroup/kubepods"))
    assert str(chosen_cgroup(config)) == "/sys/fs/cgroup/kubepods"


def test_another_network_namespace_is_not_the_whole_machine(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(_socketlb_site, "HOST_ONLY", tmp_path / "absent")
    with pytest.raises(Off, match="not in the host's network namespace"):
        chosen_cgroup(Config())


def test_switched_off_is_off_wherever(machine):
    config = Config(userspace=Userspace(socket_lb="off", cgroup="/sys/fs/cgroup"))
    with pytest.raises(Off, match="socketLB is off"):
        chosen_cgroup(config)


@pytest.mark.parametrize("kinds", [(), ("proc",)])
def test_without_cgroup_v2_there_is_nothing_to_attach_to(machine, kinds):
    machine(*kinds)
    with pytest.raises(Off, match="no cgroup v2 is mounted"):
        chosen_cgroup(Config())


def test_a_part_of_the_cgroups_is_not_the_root(machine):
    machine("cgroup2", root_of="/../..")
    with pytest.raises(Off, match="no cgroup v2 is mounted"):
        chosen_cgroup(Config())


def test_a_container_that_sees_its_own_cgroups_only_is_told_what_to_do(machine, tmp_path):
    (tmp_path / "cgroup/cgroup.type").touch()
    with pytest.raises(Off, match="mount the host's"):
        chosen_cgroup(Config())


def test_pins_of_other_cgroups_and_layouts_go_and_those_of_others_stay(
    machine, monkeypatch, tmp_path
):
    monkeypatch.setattr(_socketlb_site, "own_cookie", lambda: 12)
    at = tmp_path / "bpf fs/pyproxy"
    ours = pins(tmp_path / "cgroup", 4)
    assert ours.parent == at
    names = ["12-ipv4-0-77", "12-ipv6-1-77", "123-ipv4-1-77"]
    for folder in (ours, *(at / name for name in names)):
        folder.mkdir(parents=True)
        (folder / "reverse").touch()
    remove_pins(4, but=ours)
    assert sorted(p.name for p in at.iterdir()) == sorted([ours.name, *names[1:]])
    remove_pins(4)
    assert sorted(p.name for p in at.iterdir()) == names[1:]

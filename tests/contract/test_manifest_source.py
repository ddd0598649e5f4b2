"""Manifest files on a real file system: what is read, and what is noticed."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest

from pyproxy.manifests.source import ManifestError, ManifestSource
from pyproxy.model import Node, ObjectName

CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
PATIENCE_SECONDS = 10  # a limit for a test that fails, not a wait
POLL_SECONDS = 0.01


def service(name, port=80):
    return (
        f"apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n"
        f"spec:\n  ports:\n  - port: {port}\n---\n"
    )


def huge(path):
    path.touch()
    os.truncate(path, (64 << 20) + 1)


class Listener:
    """What a source has told, and a way to wait for it."""

    def __init__(self):
        self.objects = {}
        self.errors = []
        self.changes = 0
        self._told = asyncio.Event()

    def change(self, change):
        self.changes += 1
        self.objects[change.kind] = change.objects
        self._told.set()

    def error(self, text):
        self.errors.append(text)
        self._told.set()

    @property
    def ports(self):
        return {found.name.name: found.ports[0].port for found in self.objects["Service"]}

    async def until(self, is_so):
        """Wait for what the source tells until the condition holds."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_so():
                self._told.clear()
                await self._told.wait()

    async def listed(self):
        await self.until(lambda: len(self.objects) == 4)


@asynccontextmanager
async def following(path, cidrs=CIDRS):
    listener = Listener()
    source = ManifestSource(path, "here", cidrs, poll_seconds=POLL_SECONDS)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(source.follow(listener.change, listener.error), name="follow")
        try:
            await listener.listed()
            yield listener
        finally:
            task.cancel()


@pytest.fixture
def folder(tmp_path):
    """A directory of its own: pytest's may be hidden or have other files."""
    folder = tmp_path / "manifests"
    folder.mkdir()
    return folder


async def test_an_empty_directory_is_a_complete_list_of_nothing(folder):
    async with following(folder) as listener:
        assert listener.objects["Service"] == ()
        assert listener.objects["EndpointSlice"] == ()
        assert listener.objects["Node"] == (Node("here"),)
        assert [cidr.name for cidr in listener.objects["ServiceCIDR"]] == ["kubernetes"]


async def test_all_manifests_of_a_tree_are_read_and_nothing_else(folder):
    (folder / "deeper/.git").mkdir(parents=True)
    (folder / "a.yaml").write_text(service("a") + service("b"))
    (folder / "deeper/c.yml").write_text(service("c"))
    (folder / "deeper/d.json").write_text(
        '{"kind": "Service", "metadata": {"name": "d"}, "spec": {"ports": [{"port": 80}]}}'
    )
    (folder / "README.md").write_text(service("no"))
    (folder / ".a.yaml.draft.yaml").write_text(service("no"))
    (folder / "deeper/.git/x.yaml").write_text(service("no"))
    async with following(folder) as listener:
        assert (list(listener.ports), listener.errors) == (["a", "b", "c", "d"], [])


async def test_one_file_is_followed_whatever_its_name(folder):
    path = folder / "manifests.txt"
    path.write_text(service("web"))
    async with following(path) as listener:
        assert listener.ports == {"web": 80}
        path.write_text(service("web", 81))
        await listener.until(lambda: listener.ports == {"web": 81})


async def test_files_that_come_change_and_go_are_noticed(folder):
    async with following(folder) as listener:
        path = folder / "shop.yaml"
        path.write_text(service("a"))
        await listener.until(lambda: listener.ports == {"a": 80})
        path.write_text(service("a", 81) + service("b"))
        await listener.until(lambda: listener.ports == {"a": 81, "b": 80})
        path.write_text(service("b"))
        await listener.until(lambda: listener.ports == {"b": 80})
        path.unlink()
        await listener.until(lambda: listener.ports == {})
        assert listener.errors == []


async def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_noticed(folder):
    path, draft = folder / "shop.yaml", folder / ".draft"
    path.write_text(service("web", 80))
    os.utime(path, ns=(0, 0))
    async with following(folder) as listener:
        draft.write_text(service("web", 81))
        os.utime(draft, ns=(0, 0))
        draft.replace(path)
        await listener.until(lambda: listener.ports == {"web": 81})


async def test_a_mounted_configmap_is_read_once_and_its_swap_is_noticed(folder):
    for version, port in (("..1", 80), ("..2", 81)):
        (folder / version).mkdir()
        (folder / version / "web.yaml").write_text(service("web", port))
    (folder / "..data").symlink_to("..1")
    (folder / "web.yaml").symlink_to("..data/web.yaml")
    async with following(folder) as listener:
        assert (listener.ports, listener.errors) == ({"web": 80}, [])
        (folder / "..swap").symlink_to("..2")
        (folder / "..swap").replace(folder / "..data")
        await listener.until(lambda: listener.ports == {"web": 81})


async def test_a_file_that_is_touched_changes_nothing(folder):
    path = folder / "a.yaml"
    path.write_text(service("a"))
    async with following(folder) as listener:
        os.utime(path, ns=(1, 1))
        (folder / "b.yaml").write_text(service("b"))
        await listener.until(lambda: "b" in listener.ports)
        assert listener.changes == 5  # four kinds, and Services once more


async def test_a_bad_file_is_told_once_and_keeps_its_last_version_until_it_is_mended(folder):
    shop, other = folder / "shop.yaml", folder / "other.yaml"
    shop.write_text(service("web"))
    async with following(folder) as listener:
        shop.write_text(service("gone") + "kind: [\n")
        await listener.until(lambda: listener.errors)
        other.write_text(service("other"))
        await listener.until(lambda: "other" in listener.ports)
        assert listener.ports == {"other": 80, "web": 80}
        shop.write_text(service("web", 81))
        await listener.until(lambda: listener.ports == {"other": 80, "web": 81})
        (error,) = [text for text in listener.errors if not text.startswith("mended: ")]
        assert error.startswith("shop.yaml: document 2: line ")
        assert listener.errors == [error, f"mended: {error}"]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        pytest.param(lambda path: path.write_bytes(b"\xff"), "byte 0 is not UTF-8", id="bytes"),
        pytest.param(os.mkfifo, "it is not a regular file", id="pipe"),
        pytest.param(
            lambda path: path.write_text(service("web", 70000)),
            "document 1: Service default/web: spec.ports[0].port: 70000 is not a port",
            id="port",
        ),
        pytest.param(
            lambda path: path.symlink_to(path),
            "Too many levels of symbolic links",
            id="link to itself",
        ),
        pytest.param(huge, "it is larger than 64 MiB", id="huge"),
    ],
)
async def test_a_file_of_no_use_is_an_error_and_stops_no_other(folder, make, error):
    make(folder / "a.yaml")
    (folder / "b.yaml").write_text(service("b"))
    async with following(folder) as listener:
        assert (listener.errors, listener.ports) == ([f"a.yaml: {error}"], {"b": 80})


async def test_a_link_that_leads_nowhere_is_no_file(folder):
    (folder / "a.yaml").symlink_to("missing.yaml")
    async with following(folder) as listener:
        assert (listener.errors, listener.ports) == ([], {})


async def test_a_directory_that_vanishes_removes_nothing(folder):
    (folder / "a.yaml").write_text(service("a"))
    away = folder.with_name("away")
    async with following(folder) as listener:
        folder.rename(away)
        await listener.until(lambda: listener.errors)
        trouble = f"{folder}: No such file or directory; what was read last stays"
        assert (listener.errors, listener.ports) == ([trouble], {"a": 80})
        away.rename(folder)
        await listener.until(lambda: len(listener.errors) == 2)
        assert listener.errors == [trouble, f"mended: {trouble}"]


async def test_a_subdirectory_that_is_removed_removes_its_services(folder):
    (folder / "deeper").mkdir()
    (folder / "deeper/a.yaml").write_text(service("a"))
    async with following(folder) as listener:
        (folder / "deeper/a.yaml").unlink()
        (folder / "deeper").rmdir()
        await listener.until(lambda: listener.ports == {})
        assert listener.errors == []


async def test_what_is_not_there_at_the_start_is_an_error_that_says_what_to_do(folder):
    source = ManifestSource(folder / "missing", "here", CIDRS)
    with pytest.raises(ManifestError) as raised:
        await source.follow(print, print)
    assert str(raised.value) == (
        f"--manifests {folder}/missing: No such file or directory; create it, or give the path "
        "of a file or directory with Services in YAML or JSON"
    )


@pytest.mark.parametrize(
    ("cidrs", "error"),
    [
        pytest.param(["10.96.0.0"], "10.96.0.0 is not a range; write 10.96.0.0/16", id="no range"),
        pytest.param(
            ["10.96.0.0/16", "10.97.0.0/16"],
            "10.96.0.0/16,10.97.0.0/16 has two of one family; give one of each",
            id="two of one family",
        ),
    ],
)
def test_service_ranges_are_one_of_each_family(folder, cidrs, error):
    with pytest.raises(ManifestError) as raised:
        ManifestSource(folder, "here", cidrs)
    assert str(raised.value) == f"--service-cidr: {error}"


async def test_the_first_range_decides_about_the_family(folder):
    (folder / "a.yaml").write_text(service("a"))
    async with following(folder, cidrs=CIDRS[::-1]) as listener:
        (found,) = listener.objects["Service"]
    assert found.name == ObjectName("default", "a")
    assert found.cluster_ip4 is None
    assert found.cluster_ip6.startswith("fd00:10:96::")

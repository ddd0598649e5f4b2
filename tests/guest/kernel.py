"""A Debian kernel to boot: fetched and unpacked, not installed, with an initramfs of our own."""

import fcntl
import lzma
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

META_PACKAGE = "linux-image-cloud-amd64"  # the release's kernel for virtual machines
# What the guest needs before it sees the host's files; everything else loads from there.
EARLY = ("virtio_pci", "virtiofs", "overlay")
BUSYBOX = Path("/bin/busybox")
DONE = "made"  # a file that is written last; its content changes with what is made
FORMAT = "1"

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc /host /ram /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
for module in $(cat /order); do insmod /modules/$module; done
mount -t virtiofs host /host && mount -t tmpfs -o size=80% ram /ram && mkdir /ram/upper /ram/work &&
  mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work root /root || exit
mount -t tmpfs run /root/run && cp /start /root/run/ && exec switch_root /root /bin/sh /run/start
"""


class CannotBoot(Exception):
    """Something is missing; the message says what, and how to get it."""


class Kernel(NamedTuple):
    """A kernel that can boot."""

    image: Path
    initramfs: Path
    modules: Path  # named by the release


def prepared(folder: Path) -> Kernel:
    """Return the kernel kept in a folder; fetch it if there is none. Raises ``CannotBoot``."""
    done = folder / DONE
    with folder.with_suffix(".lock").open("w") as lock:  # somebody else may be at it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() or done.read_text() != FORMAT:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            fetch(folder)
            (folder / "initramfs").write_bytes(initramfs(modules_in(folder)))
            done.write_text(FORMAT)
    (image,) = (folder / "boot").glob("vmlinuz-*")
    return Kernel(image, folder / "initramfs", modules_in(folder))


def modules_in(folder: Path) -> Path:
    (modules,) = (folder / "lib/modules").iterdir()
    return modules


def fetch(folder: Path) -> None:
    try:
        run("apt-get", "-qq", "download", newest(), folder=folder)
    except CannotBoot:  # the lists are missing, or too old
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "download", newest(), folder=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg", "-x", archive.name, ".", folder=folder)
    archive.unlink()
    run("/sbin/depmod", "-b", str(folder), modules_in(folder).name, folder=folder)


def newest() -> str:
    for line in run("apt-cache", "depends", META_PACKAGE).splitlines():
        relation, _, package = line.strip().partition(" ")
        if relation == "Depends:" and package.startswith("linux-image-"):
            return package
    raise CannotBoot(f"apt knows no package {META_PACKAGE}: this needs Debian on amd64")


def run(*argv: str, folder: Path | None = None) -> str:
    """Run a program that must succeed; return what it printed. Raises ``CannotBoot``."""
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(argv, cwd=folder, stdout=pipe, stderr=pipe, text=True)
    except OSError as error:
        raise CannotBoot(f"cannot run {argv[0]}: {error.strerror}") from error
    output, errors = child.communicate(timeout=300)
    if child.returncode:
        raise CannotBoot(f"{' '.join(argv)}: {errors.strip()}")
    return output


# --- the initramfs --------------------------------------------------------------------------------


def initramfs(modules: Path) -> bytes:
    if not BUSYBOX.exists():
        raise CannotBoot(f"there is no {BUSYBOX}: apt-get install busybox-static")
    early = list(load_order(modules))
    files = {"init": INIT.encode(), "bin/busybox": BUSYBOX.read_bytes()}
    files["order"] = "\n".join(Path(path).name.removesuffix(".xz") for path in early).encode()
    for path in early:
        data = (modules / path).read_bytes()
        if path.endswith(".xz"):
            path, data = path.removesuffix(".xz"), lzma.decompress(data)
        files[f"modules/{Path(path).name}"] = data
    return cpio(files)


def load_order(modules: Path) -> Iterator[str]:
    """Yield the files of the early modules after those of the modules that each needs."""
    needs: dict[str, list[str]] = {}  # which modules.dep has in the opposite order
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.split(".")[0]: path for path in needs}
    seen = set()
    for name in EARLY:
        if name in by_name:  # else it is built in
            for path in (*reversed(needs[by_name[name]]), by_name[name]):
                if path not in seen:
                    seen.add(path)
                    yield path


def cpio(files: Mapping[str, bytes]) -> bytes:
    """Return an archive as the kernel unpacks it, "newc"; such archives may follow one another."""
    folders = {str(p): b"" for name in files for p in Path(name).parents if p != Path()}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in sorted(folders)]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    return b"".join(cpio_entry(*entry) for entry in [*entries, ("TRAILER!!!", 0, b"")])


def cpio_entry(name: str, mode: int, data: bytes) -> bytes:
    inode, uid, gid, links, time, device, check = 0, 0, 0, 1, 0, (0, 0, 0, 0), 0
    size, name_size = len(data), len(name) + 1
    fields = (inode, mode, uid, gid, links, time, size, *device, name_size, check)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-size % 4)

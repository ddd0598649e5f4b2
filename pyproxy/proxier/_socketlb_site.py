"""Where on this machine sockets may be balanced, and where that is pinned."""

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

from pyproxy.config import Config
from pyproxy.model import Family
from pyproxy.proxier._bpf import detach, mount_bpffs, pinned
from pyproxy.rules.socketlb_code import HOOKS

LAYOUT = 1  # of the maps' keys and values: what another one has pinned is not adopted
BPFFS = Path("/sys/fs/bpf")
FOLDER = "pyproxy"
SO_NETNS_COOKIE = 71
MOUNTS = Path("/proc/self/mountinfo")
OCTAL = re.compile(r"\\([0-7]{3})")
# Sysctls that only the first network namespace of a machine has.
HOST_ONLY = Path("/proc/sys/net/core/netdev_budget")


class Mount(NamedTuple):
    kind: str
    root: str
    at: Path


class Off(Exception):
    """Sockets are not to be balanced here; the text says why."""


def chosen_cgroup(config: Config) -> Path:
    """Return the cgroup to attach to. Raises ``Off``.

    The programs see every process in it. By itself, that is the root: every process of the
    machine, so only where the machine's network is the one we serve. In a network namespace of
    its own (a node in a container, a laboratory) the setting has to say which processes are the
    node's.
    """
    if config.userspace.socket_lb == "off":
        raise Off("userspace.socketLB is off")
    if config.userspace.cgroup:
        return Path(config.userspace.cgroup)
    if not HOST_ONLY.exists():
        raise Off("not in the host's network namespace, and userspace.cgroup is not set")
    roots = [mount.at for mount in mounts() if mount.kind == "cgroup2" and mount.root == "/"]
    if not roots:
        raise Off("no cgroup v2 is mounted")
    for root in roots:
        if not (root / "cgroup.type").exists():  # the one file that only the true root has not
            return root
    raise Off(
        f"{roots[0]} has no cgroups but this container's: "
        "mount the host's, and set userspace.cgroup"
    )


def pins(cgroup: Path, family: Family) -> Path:
    """Return the folder for pins; a bpf file system is mounted where there is none.

    Its name begins with our network namespace: others that share the file system have their own.
    Raises ``OSError``.
    """
    found = bpf_file_systems()
    if not found:
        mount_bpffs(BPFFS)
        found = [BPFFS]
    at = BPFFS if BPFFS in found else found[0]
    return at / FOLDER / f"{own_cookie()}-ipv{family}-{LAYOUT}-{cgroup.stat().st_ino}"


def remove_pins(family: Family, *, but: Path | None = None) -> None:
    """Remove what was pinned for a family of this network namespace. Raises ``OSError``.

    When it returns, their programs see no connection any more.
    """
    found = [folder for at in bpf_file_systems() for folder in (at / FOLDER).glob("*-*-*-*")]
    if found:
        ours = f"{own_cookie()}-ipv{family}-"
        for folder in found:
            if folder.name.startswith(ours) and folder != but:
                detach_links(family, folder)
                rmtree(folder)


def detach_links(family: Family, folder: Path) -> None:
    """End the programs whose links are pinned here. Raises ``OSError``."""
    for hook in HOOKS[family]:
        if (link := pinned(folder / str(hook))) is not None:
            with link:
                detach(link)


def own_cookie() -> int:
    """Return the number of this network namespace, which no other one will ever have.

    Raises ``OSError`` before Linux 5.14.
    """
    with socket.socket() as sock:
        packed = sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int.from_bytes(packed, sys.byteorder)


def bpf_file_systems() -> list[Path]:
    """Return where one is mounted: each place once, even if several lie on top of each other."""
    return list(dict.fromkeys(mount.at for mount in mounts() if mount.kind == "bpf"))


def mounts() -> Iterator[Mount]:
    """Yield what is mounted, as proc_pid_mountinfo(5) has it."""
    for line in MOUNTS.read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        _id, _parent, _device, root, at, *_ = before.split(" ")
        yield Mount(after.split(" ")[0], root, Path(OCTAL.sub(lambda m: chr(int(m[1], 8)), at)))

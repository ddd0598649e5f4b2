"""Run pyproxy under the conformance kit with socket load balancing: python tests/kit_socketlb.py.

    python -m tests.kit_socketlb run KIT [OPTIONS OF THE KIT]

The kit's clients are sockets of one process, in namespaces of a node, its pods, and of others. So
the whole kit runs in a cgroup of its own, and ``start``, which the kit calls in place of pyproxy,
says which namespaces are the node's: it pins that map before pyproxy looks for it.
"""

import os
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import yaml

from pyproxy.proxier import _bpf
from pyproxy.proxier._socketlb_kernel import OTHERS, SHAPES
from pyproxy.proxier._socketlb_site import BPFFS, mounts, own_cookie, pins
from pyproxy.rules.socketlb import POD
from tests.netns.pods import in_namespace

PODS = [f"a{number}" for number in range(1, 7)]


def run(kit, *options):
    """Run the kit in a new cgroup; return its exit status."""
    root = next(m.at for m in mounts() if m.kind == "cgroup2" and m.root == "/")
    home = root / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    group = home / f"pyproxy-kit-{os.getpid()}"
    group.mkdir()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    inside = group.relative_to(root)
    proxy = f"{sys.executable} -m tests.kit_socketlb start {inside} {{config}} {{dir}}"
    try:
        command = [kit, "run", "--mode=userspace", f"--proxy=env PYTHONPATH={os.getcwd()} {proxy}"]
        return subprocess.call([*command, *options])
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        remove(group)


def remove(group):
    """Remove a cgroup, once the last process that the kit has ended is gone."""
    for _ in range(50):
        with suppress(OSError):
            return group.rmdir()
        time.sleep(0.1)  # noqa: TID251 - there is no event loop
    return group.rmdir()


def start(inside, config, folder):
    """Become pyproxy, in the namespaces that the kit has made for it."""
    mount = Path(folder, "cgroup")
    mount.mkdir(exist_ok=True)
    subprocess.check_call(["mount", "-t", "cgroup2", "cgroup2", str(mount)])
    _bpf.mount_bpffs(BPFFS)
    settings = yaml.safe_load(Path(config).read_text())
    settings["userspace"] = {**settings.get("userspace", {}), "cgroup": str(mount / inside)}
    own = Path(folder, "socketlb.yaml")
    own.write_text(yaml.safe_dump(settings))
    kit = os.getppid()
    for family in (4, 6):
        at = pins(mount / inside, family)
        at.mkdir(parents=True)
        kind, key_size, value_size, entries, flags = SHAPES["origins"]
        with _bpf.create_map(kind, key_size, value_size, entries, flags=flags) as origins:
            origins[OTHERS] = struct.pack("=I", 0)
            for pod in PODS:
                cookie = in_namespace(f"/proc/{kit}/root/run/netns/kc{kit:x}-{pod}", own_cookie)
                origins[struct.pack("=Q", cookie)] = struct.pack("=I", POD)
            origins.pin(at / "origins")
    os.execv(sys.executable, [sys.executable, "-m", "pyproxy", f"--config={own}"])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", kit, *options]:
            sys.exit(run(kit, *options))
        case ["start", *words]:
            start(*words)

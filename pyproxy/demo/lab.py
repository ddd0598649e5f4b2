"""The demo's network: namespaces, links and routes that vanish with the process that made them.

Named namespaces are files under /run/netns. The demo mounts a file system of its own there, in a
mount namespace that only its own processes see: when the last of them ends, however it ends, the
kernel takes everything back, and nothing has to be tidied up.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyproxy.demo.cluster import (
    CLIENT,
    GATEWAY_IPS,
    LOAD_BALANCER_CIDR,
    NODES,
    PODS,
    REPLACEMENTS,
    SERVICE_CIDRS,
    SHELL,
    Machine,
    Node,
    Pod,
    of_families,
)
from pyproxy.model import family_of

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_PDEATHSIG = 1

NAMESPACES = Path("/run/netns")
# A host's settings reach new namespaces: without these, its firewall hardening would be tested.
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    # What is refused comes in and would go out by one interface: the kernel would tell the client
    # of a better way, and take from the ration of ICMP messages that the refusal needs.
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/ipv6/conf/all/forwarding": "1",
}

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """The demo cannot run on this system; the message is one line that says what is missing."""


def isolate() -> bool:
    """Move this process, which must have one thread, into namespaces of its own.

    Root needs none but those of network and mounts; anybody else first becomes root of a user
    namespace, in which both are allowed. Return whether that was so.
    """
    if shutil.which("ip") is None:
        raise Unavailable("pyproxy demo needs the ip command: apt-get install iproute2")
    try:
        return not _isolated_as_root() and _isolated_as_user()
    except OSError as error:
        raise Unavailable(
            f"pyproxy demo needs network namespaces ({error.strerror}): run it as root,"
            " or allow ordinary users to have user namespaces"
        ) from error


def _isolated_as_root() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        _call("unshare", CLONE_NEWNS | CLONE_NEWNET)
    except PermissionError:  # root in name only: a container's
        return False
    _hide(NAMESPACES)
    return True


def _isolated_as_user() -> bool:
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1", encoding="ascii")
    # All of /run: this root may neither create /run/netns nor lock the host's xtables.lock.
    _hide(NAMESPACES.parent)
    return True


def _hide(folder: Path) -> None:
    """Mount an empty file system over a folder, for this process and its children only."""
    _call("mount", b"none", b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    folder.mkdir(exist_ok=True)
    _call("mount", b"pyproxy-demo", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), b"mode=755")


def _call(function: str, *args: object) -> None:
    if getattr(_libc, function)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function}: {os.strerror(code)}")


class Lab:
    """The network, built when the object is made; the process must have been isolated.

    The process's own namespace is the wire that the nodes and the client are plugged into.
    """

    def __init__(self) -> None:
        self.ipv6 = Path("/proc/sys/net/ipv6").exists()
        pods = (*PODS, *REPLACEMENTS, SHELL)
        names = [node.name for node in NODES] + [CLIENT.name] + [pod.name for pod in pods]
        _ip(f"netns add {name}" for name in names)
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._files = {name: _opened(name) for name in names}
        for name in names:
            self._set_sysctls(name)
        self._build_underlay()
        for node in NODES:
            self._build_node(node, [pod for pod in pods if pod.node == node.name])

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Put the current thread into a namespace: nobody may await in the block."""
        _call("setns", self._files[name], CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", self._home, CLONE_NEWNET)

    def socket(self, name: str, ip: str) -> socket.socket:
        """Return a TCP socket of a namespace, and of the address's family.

        A socket belongs for ever to the namespace it was opened in, whoever uses it.
        """
        family = socket.AF_INET if family_of(ip) == 4 else socket.AF_INET6
        with self.inside(name):
            opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setblocking(False)
        return opened

    def enter(self, name: str) -> None:
        """Move into a namespace for good, and die with the parent: a child does so before exec."""
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        _call("setns", self._files[name], CLONE_NEWNET)

    def _set_sysctls(self, name: str) -> None:
        with self.inside(name):
            for key, value in SYSCTLS.items():
                if self.ipv6 or "ipv6" not in key:
                    Path("/proc/sys", key).write_text(value, encoding="ascii")

    def _build_underlay(self) -> None:
        _ip(
            [
                "link set lo up",
                "link add underlay type bridge",
                "link set underlay up",
                *self._addresses("underlay", GATEWAY_IPS, (24, 64)),
            ]
        )
        for machine in (*(node.machine for node in NODES), CLIENT):
            _ip(
                [
                    f"link add {machine.name} type veth peer name eth0 netns {machine.name}",
                    f"link set {machine.name} master underlay up",
                ]
            )
            self._plug(machine)
        _ip(
            (
                f"route add {cidr} via {via}"
                for cidr, via in zip(
                    self._kept((*SERVICE_CIDRS[:1], LOAD_BALANCER_CIDR, *SERVICE_CIDRS[1:])),
                    self._kept((NODES[0].machine.ips[0], *NODES[0].machine.ips)),
                    strict=True,
                )
            ),
            CLIENT.name,
        )

    def _plug(self, machine: Machine) -> None:
        _ip(
            [
                "link set lo up",
                "link set eth0 up",
                *self._addresses("eth0", machine.ips, (24, 64)),
                *(f"route add default via {ip}" for ip in self._kept(GATEWAY_IPS)),
            ],
            machine.name,
        )

    def _build_node(self, node: Node, pods: Iterable[Pod]) -> None:
        """Give each pod a link of its own, without a bridge.

        So every packet between pods is routed, and kernel modes need no bridge netfilter.
        """
        lines = [
            f"route add {cidr} via {via}"
            for other in NODES
            if other != node
            for cidr, via in zip(
                self._kept(other.pod_cidrs), self._kept(other.machine.ips), strict=True
            )
        ]
        for pod in pods:
            lines.append(f"link add {pod.name} type veth peer name eth0 netns {pod.name}")
            lines.append(f"link set {pod.name} up")
            lines += self._addresses(pod.name, node.pod_gateways, (32, 128))
            lines += [f"route add {ip} dev {pod.name}" for ip in self._kept(pod.ips)]
        _ip(lines, node.name)
        for pod in pods:
            gateways = self._kept(node.pod_gateways)
            _ip(
                [
                    "link set lo up",
                    "link set eth0 up",
                    *self._addresses("eth0", pod.ips, (32, 128)),
                    *(f"route add {gateway} dev eth0" for gateway in gateways),
                    *(f"route add default via {gateway}" for gateway in gateways),
                ],
                pod.name,
            )

    def _addresses(self, link: str, ips: tuple[str, ...], bits: tuple[int, int]) -> list[str]:
        return [
            f"addr add {ip}/{bits[0]} dev {link}"
            if family_of(ip) == 4
            else f"addr add {ip}/{bits[1]} dev {link} nodad"
            for ip in self._kept(ips)
        ]

    def _kept(self, ips: tuple[str, ...]) -> tuple[str, ...]:
        return of_families(ips, ipv6=self.ipv6)


def _opened(name: str) -> int:
    return os.open(NAMESPACES / name, os.O_RDONLY | os.O_CLOEXEC)


def _ip(commands: Iterable[str], namespace: str | None = None) -> None:
    """Carry out commands of ``ip`` in a namespace; the first that fails ends the demo."""
    argv = ["ip", *(("-n", namespace) if namespace else ()), "-batch", "-"]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        _, errors = process.communicate("".join(f"{command}\n" for command in commands))
    if process.returncode != 0:
        where = namespace or "the underlay"
        raise Unavailable(f"ip failed in {where}: {' '.join(errors.split())}")

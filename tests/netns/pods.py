"""Network namespaces that are pods of the node which these tests are: sockets made in one."""

import ctypes
import os
import socket
import subprocess
import threading
from contextlib import contextmanager

from tests.netns.conftest import run

CLONE_NEWNET = 0x40000000
LIBC = ctypes.CDLL(None, use_errno=True)
GATEWAY = {4: "10.244.1.1", 6: "fd00:10:244:1::1"}
POD_IP = {4: "10.244.1.20", 6: "fd00:10:244:1::20"}


class Pod:
    def __init__(self, namespace):
        self._namespace = namespace

    def socket(self, family, kind=socket.SOCK_STREAM):
        """Return a socket that lives in the pod."""
        return self.call(lambda: plain_socket(family, kind))

    def call(self, function):
        """Return what a function returns in the pod's network."""
        return in_namespace(f"/proc/self/fd/{self._namespace}", function)


def plain_socket(family, kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_INET6 if family == 6 else socket.AF_INET, kind)
    sock.settimeout(2.0)
    return sock


@contextmanager
def pod():
    """A pod with an address of each family, whose gateway is this node."""
    started = []

    def start():
        assert LIBC.unshare(CLONE_NEWNET) == 0
        started.append(subprocess.Popen(["sleep", "infinity"]))

    in_thread(start)
    process = started[0]
    namespace = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY)
    path = f"/proc/{os.getpid()}/fd/{namespace}"
    run("ip", "link", "add", "veth-pod", "type", "veth", "peer", "name", "eth0", "netns", path)
    inside = ("nsenter", f"--net={path}")
    try:
        run("ip", "link", "set", "veth-pod", "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "link", "set", "eth0", "up")
        for family, length in ((4, 24), (6, 64)):
            nodad = ["nodad"] if family == 6 else []
            gateway, own = GATEWAY[family], POD_IP[family]
            run("ip", "addr", "add", f"{gateway}/{length}", "dev", "veth-pod", *nodad)
            run(*inside, "ip", "addr", "add", f"{own}/{length}", "dev", "eth0", *nodad)
            run(*inside, "ip", "route", "add", "default", "via", gateway)
        yield Pod(namespace)
    finally:
        run("ip", "link", "delete", "veth-pod")
        os.close(namespace)
        process.kill()
        process.wait()


def in_namespace(path, function):
    """Return what a function returns in another network namespace."""
    results = []

    def work():
        namespace = os.open(path, os.O_RDONLY)
        assert LIBC.setns(namespace, CLONE_NEWNET) == 0
        os.close(namespace)
        results.append(function())

    in_thread(work)
    return results[0]


def in_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

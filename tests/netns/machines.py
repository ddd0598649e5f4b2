"""Machines around this node, which is the namespace of the tests: programs that ask and answer."""

import asyncio
import json
import subprocess
import sys
from contextlib import contextmanager

GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}

WHO = """
import socket, sys, threading
ip, port = sys.argv[1], int(sys.argv[2])
kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
tcp, udp = socket.socket(kind, socket.SOCK_STREAM), socket.socket(kind, socket.SOCK_DGRAM)
tcp.bind((ip, port)); tcp.listen(100); udp.bind((ip, port))
print("ready", flush=True)
def datagrams():
    while True:
        length, peer = udp.recvfrom(100)
        udp.sendto(peer[0].encode().ljust(int(length)), peer)
threading.Thread(target=datagrams, daemon=True).start()
while True:
    sock, peer = tcp.accept()
    sock.sendall(peer[0].encode())
    sock.close()
"""
ASK = """
import collections, json, socket, sys
ip, port, kind, count, length = sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
seen = collections.Counter()
for _ in range(count):
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM)
    sock.settimeout(3)
    try:
        sock.connect((ip, port))
        sock.send(str(length).encode())
        seen[sock.recv(9999).decode().rstrip()] += 1
    except OSError as error:
        seen[str(error)] += 1
    sock.close()
print(json.dumps(seen))
"""


class Machine:
    """A namespace behind an interface of this one, or of a bridge."""

    def __init__(self, stack, name, addresses, *, bridge=None):
        command = ["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"]
        process = stack.enter_context(started(command))
        self._pid = str(process.pid)
        done("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", self._pid)
        stack.callback(done, "ip", "link", "del", name)
        done("ip", "link", "set", name, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "up")
        if bridge is None:
            self._routed(name, addresses)
        else:
            done("ip", "link", "set", name, "master", bridge.name)
            self._on(bridge, addresses)

    def _routed(self, name, addresses):
        done("ip", "addr", "add", f"{GATEWAY[4]}/32", "dev", name)
        done("ip", "addr", "add", f"{GATEWAY[6]}/64", "dev", name, "nodad")
        for family, ip in addresses.items():
            self._has(ip)
            gateway = [GATEWAY[family], "dev", "eth0"]
            if family == 4:
                self.run("ip", "route", "add", *gateway, "scope", "link")
            self.run("ip", f"-{family}", "route", "add", "default", "via", *gateway)
            done("ip", f"-{family}", "route", "add", ip, "dev", name)

    def _on(self, bridge, addresses):
        for family, ip in addresses.items():
            gateway, length = bridge.addresses[family].split("/")
            self._has(f"{ip}/{length}")
            self.run("ip", f"-{family}", "route", "add", "default", "via", gateway)

    def _has(self, address):
        nodad = ["nodad"] if ":" in address else []
        self.run("ip", "addr", "add", address, "dev", "eth0", *nodad)

    def command(self, *words):
        return ["nsenter", "-t", self._pid, "-n", *words]

    def run(self, *words):
        done(*self.command(*words))

    def answers(self, ip, port):
        """Say at this address who asks, by TCP and by UDP; for as long as the context lasts."""
        return started(self.command(sys.executable, "-c", WHO, ip, str(port)))

    async def asks(self, ip, port=80, *, kind="TCP", count=1, length=1):
        """Return how often each answer came; one of UDP is filled up to ``length``."""
        numbers = map(str, (count, length))
        words = self.command(sys.executable, "-c", ASK, ip, str(port), kind, *numbers)
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        answer, _ = await process.communicate()
        return json.loads(answer)


class Bridge:
    """A bridge of this node, which is the gateway of the machines on it."""

    def __init__(self, stack, name, addresses):
        self.name = name
        self.addresses = addresses
        done("ip", "link", "add", name, "type", "bridge")
        stack.callback(done, "ip", "link", "del", name)
        done("sysctl", "-qw", f"net.ipv6.conf.{name}.accept_dad=0")  # so that it speaks at once
        done("ip", "link", "set", name, "up")
        for address in addresses.values():
            nodad = ["nodad"] if ":" in address else []
            done("ip", "addr", "add", address, "dev", name, *nodad)


@contextmanager
def started(command):
    """Run a program that says when it is ready, and end it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def done(*command):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    assert process.returncode == 0, (command, said)


def forwards():
    """Have this node forward packets, as one does."""
    for name in ("ipv4.ip_forward", "ipv6.conf.all.forwarding"):
        done("sysctl", "-qw", f"net.{name}=1")

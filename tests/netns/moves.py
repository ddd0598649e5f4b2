"""Connections, new and old, from everywhere, while a node moves from one mode to another.

A program of its own: it moves into namespaces that it never leaves. It prints what it found out.
"""

import asyncio
import json
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pyproxy.demo.cluster import NODES, POD_PORT, PODS, SHELL, of_families, service_objects
from pyproxy.demo.lab import Lab, isolate
from pyproxy.demo.manifests import Manifests
from pyproxy.demo.proxy import arguments, healthy, running, tail
from tests.netns import kube_rules
from tests.netns.talk import SPEEDS, Traffic

NODE = NODES[0].name


CLIENTS = {
    "pod to cluster IP": (SHELL.name, "10.96.0.12", 8080),
    "node to cluster IP": (NODE, "10.96.0.12", 8080),
    "outside to node port": ("client", NODES[0].machine.ips[0], 30080),
    "outside to load balancer IP": ("client", "198.18.0.10", 80),
}
CLIENTS6 = {
    "pod to cluster IP, IPv6": (SHELL.name, "fd00:10:96::12", 8080),
    "node to cluster IP, IPv6": (NODE, "fd00:10:96::12", 8080),
}
OWN_TABLES = (" pyproxy", " pyproxy-ipvs", " kube-proxy")
NAME = "canary"
IP_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
MOVING = "my-nginx"  # the Service of the cluster IP, as another proxy's name for it is CLUSTER
STATIONS = ("ipvs", "iptables", "ipvs again")  # of a tour
NOBODY = ("nobody-home", "10.96.0.14", 80)  # a Service without endpoints
BLOCK = (  # nobody but pods reaches the cluster IP that a probe from the node asks
    "table inet block { chain c { type filter hook output priority -150;"
    " ip daddr 10.96.0.12 drop; }; }"
)


# Few, so that clients and who relays in their names choose the same: as after hours elsewhere.
PORTS = "40000 41000"
# What a CNI plugin has on nearly every node: so that NAT and connection tracking are always on.
CNI = """
table ip cni { chain post { type nat hook postrouting priority 100; }; }
table ip6 cni { chain post { type nat hook postrouting priority 100; }; }
table inet cni { chain tracks { type filter hook forward priority 0; ct state invalid counter; }; }
"""


class Ended(NamedTuple):
    code: int
    output: str


async def echo(reader, writer):
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


class Scene:
    """The lab, its pods, and the manifests of what is in it."""

    def __init__(self, lab, folder, speed):
        self.lab = lab
        self._speed = speed
        self.folder = Path(folder)
        manifests = self.folder / "manifests"
        manifests.mkdir()
        self._services = service_objects(ipv6=lab.ipv6)
        Manifests(manifests, self._services, PODS)
        self.manifests = manifests

    async def pods(self):
        return [
            await asyncio.start_server(echo, sock=self._listening(pod, ip))
            for pod in PODS
            for ip in of_families(pod.ips, ipv6=self.lab.ipv6)
        ]

    def _listening(self, pod, ip):
        opened = self.lab.socket(pod.name, ip)
        opened.bind((ip, POD_PORT))
        opened.listen(128)
        return opened

    @asynccontextmanager
    async def proxy(self, mode, command=("run",), while_waiting=None):
        """Have a proxy serve for the length of a block; its rules stay.

        Where it waits for connections of virtual servers first, that is done meanwhile.
        """
        words = arguments(self.manifests, mode, ipv6=self.lab.ipv6)
        program = (sys.executable, "-m", "pyproxy", *command, "--control-socket", "")
        log = self.folder / f"{command[0]}-{mode}.log"
        if command[0] == "migrate":
            words = tuple(w for w in words if w not in ("--proxy-mode", mode))
        async with running(self.lab, words, log, program) as process:
            await healthy(self.lab, process, log, self._speed.most_seconds)
            if while_waiting is not None:
                await self._said("waiting for", process=process, log=log)
                while_waiting()
            migrated = (f"to: {mode}\n", "after the removal")
            last = migrated if command[0] == "migrate" else ('"serving"',)
            await self._said(*last, process=process, log=log)
            yield log

    async def _said(self, *words, process, log):
        """Wait until the log has these words, one after another."""
        pattern = re.compile(".*?".join(map(re.escape, words)), re.DOTALL)
        try:
            async with asyncio.timeout(self._speed.most_seconds):
                while not pattern.search(log.read_text()):
                    assert process.returncode is None, tail(log)
                    await asyncio.sleep(0.1)
        except TimeoutError as error:
            raise AssertionError(f"no {words}:{tail(log)}") from error

    async def migrate(self, *own):
        shared = arguments(self.manifests, "-", ipv6=self.lab.ipv6)
        words = [word for word in shared if word not in ("--proxy-mode", "-")]
        log = self.folder / "migrate.log"
        program = (sys.executable, "-m", "pyproxy", "migrate", *own)
        async with running(self.lab, words, log, program) as process:
            try:
                async with asyncio.timeout(self._speed.most_seconds):
                    code = await process.wait()
            except TimeoutError as error:
                raise AssertionError(f"no end of the move:{tail(log)}") from error
        return Ended(code, log.read_text())

    def narrow_ports(self):
        """Have few ports for connections from the node, where it relays, and from its pod."""
        for machine in (NODE, SHELL.name):
            with self.lab.inside(machine):
                IP_PORTS.write_text(PORTS, encoding="ascii")

    def label(self, *names):
        """Give the label of a proxy to these Services, and to no others."""
        label = {"service.kubernetes.io/service-proxy-name": NAME}
        services = [
            {**s, "metadata": {**s["metadata"], "labels": label}}
            if s["metadata"]["name"] in names else s
            for s in self._services
        ]  # fmt: skip
        Manifests(self.manifests, services, PODS)

    def serves(self, mode):
        """Say whether our rules, by their mode, have the address of the Service that moves."""
        commands = {
            "nftables": ("nft", "list", "map", "ip", "pyproxy", "service-ips"),
            "userspace": ("ip", "route", "show", "table", "local", "proto", "98"),
        }
        return CLIENTS["pod to cluster IP"][1] in self.on_node(*commands[mode])

    async def until(self, is_so):
        async with asyncio.timeout(self._speed.most_seconds):
            while not is_so():  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.1)

    def rules(self):
        """Return what there is of each mode's rules on the node, by its names."""
        nft = self.on_node("nft", "list", "tables").split("\n")
        tables = [name for name in nft if name.endswith(OWN_TABLES)]
        chains = "KUBE-SERVICES" in self.on_node("iptables-save", "-t", "nat")
        return sorted({*tables, *(["iptables"] if chains else [])})

    def on_node(self, *words, text=None):
        with subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: self.lab.enter(NODE),
        ) as process:
            output, _ = process.communicate(text)
        assert process.returncode == 0, output
        return output


async def found_out(lab, story, old, new, folder, speed):
    """Move from an old mode to a new one, and return what became of connections."""
    scene = Scene(lab, folder, speed)
    servers = await scene.pods()
    clients = CLIENTS | (CLIENTS6 if lab.ipv6 and not old.startswith("kube") else {})
    if story == "blocked":
        clients = {name: client for name, client in clients.items() if client[0] != NODE}
    traffic = Traffic(lab, clients, speed)
    if story == "toured" or "userspace" in (old, new):
        scene.on_node("nft", "-f", "-", text=CNI)
    try:
        ended = await STORIES[story](scene, traffic, old, new)
    finally:
        for server in servers:
            server.close()
    return {
        "code": ended.code,
        "output": ended.output,
        "rules": scene.rules(),
        "made": traffic.made,
        "failed": len(traffic.failures),
        "failures": sorted(set(traffic.failures)),
        "lost": traffic.lost,
    }


async def begin(scene, old):
    """Put the old rules in place, with nobody to look after them."""
    if old.startswith("kube-"):
        command, text = kube_rules.BY_MODE[old]
        scene.on_node(*command, text=text)
    else:
        async with scene.proxy(old):
            pass


async def moved(scene, traffic, old, new):
    """From rules to rules, and then the proxy that stays takes over."""
    await begin(scene, old)
    async with traffic.flowing():
        await traffic.more()
        ended = await scene.migrate(f"--to={new}")
        await traffic.more()
        async with scene.proxy(new):
            await traffic.more()
    return ended


async def entered(scene, traffic, old, new):
    """From rules to a process that carries traffic itself."""
    await begin(scene, old)
    async with traffic.flowing():
        await traffic.more()
        async with scene.proxy(new, ("migrate", "--then-run", f"--to={new}")) as log:
            await traffic.more()
            traffic.stop()  # before the process goes that carries it
    return Ended(0, log.read_text())


async def left(scene, traffic, old, new):
    """From a process that carries traffic itself, which stays until the rules are there.

    What it carries lives as long as it does: the long connections are made anew after the move.
    """
    scene.narrow_ports()
    async with traffic.flowing():
        traffic.stop()
        async with scene.proxy(old):
            traffic.begin()
            await traffic.more()
            ended = await scene.migrate(f"--to={new}")
            traffic.renew_long()
            await traffic.more()
        await traffic.more()
        async with scene.proxy(new):
            await traffic.more()
    return ended


async def toured(scene, traffic, old, new):
    """Through mode ipvs again and again, with connections from each station to the end.

    Sockets cannot take over what virtual servers have, so the move to them waits for the clients;
    nor can virtual servers take over what a process relays.
    """
    await begin(scene, old)
    output = ""
    async with traffic.flowing():
        await traffic.more()
        for station in STATIONS:
            mode = station.split()[0]
            ended = await scene.migrate(f"--to={mode}")
            output += ended.output
            if ended.code:
                return Ended(ended.code, output)
            traffic.begin_long(station)
            await traffic.more()
            if mode == "iptables":  # beside virtual servers that wait for their end
                async with scene.proxy(mode):
                    await traffic.more()
        command = ("migrate", "--then-run", "--to=userspace")
        clients_end = partial(traffic.stop, "ipvs", "ipvs again")
        async with scene.proxy("userspace", command, clients_end) as log:
            traffic.begin_long("userspace")
            await traffic.more()
            ended = await scene.migrate(f"--to={new}")
            traffic.stop("userspace")
            await traffic.more()
        await traffic.more()
        async with scene.proxy(new):
            await traffic.more()
    return Ended(ended.code, output + log.read_text() + ended.output)


async def beside(scene, traffic, old, new):
    """A Service goes to a proxy with a name, beside the one that has the others, and back.

    Nobody looks after kube-proxy's rules here: they go when ours are there, and come back a second
    after the label has gone, which is how often it writes.
    """
    await begin(scene, old)
    command = ("run", f"--service-proxy-name={NAME}")
    async with traffic.flowing(), scene.proxy(new, command) as log:
        await traffic.more()
        if old == "kube-nftables":  # as where ours were there first: of two, the later looks first
            again = f"delete table ip kube-proxy;{kube_rules.nftables()}"
            scene.on_node("nft", "-f", "-", text=again)
        scene.label(MOVING, NOBODY[0])
        await scene.until(lambda: scene.serves(new))
        scene.on_node(*kube_rules.leaves(old, "CLUSTER"))
        await traffic.more()
        refused = await refusal(scene.lab, SHELL.name, *NOBODY[1:])
        scene.label()
        await asyncio.sleep(1)
        assert scene.serves(new), "it stays until the other has begun"
        scene.on_node(*kube_rules.returns(old, "CLUSTER"))
        await scene.until(lambda: not scene.serves(new))
        await traffic.more()
    scene.on_node(sys.executable, "-m", "pyproxy", "cleanup", command[1])
    return Ended(0, f"{refused}\n{log.read_text()}")


async def refusal(lab, namespace, ip, port):
    """Return the name of what a connection fails with."""
    opened = lab.socket(namespace, ip)
    try:
        async with asyncio.timeout(2):
            await asyncio.get_running_loop().sock_connect(opened, (ip, port))
    except OSError as error:  # which a TimeoutError is
        return type(error).__name__
    finally:
        opened.close()
    return "connected"


async def blocked(scene, traffic, old, new):
    """A move that fails when the old rules are silent: nobody but its probe notices."""
    await begin(scene, old)
    before = scene.rules()
    async with traffic.flowing():
        await traffic.more()
        scene.on_node("nft", "-f", "-", text=BLOCK)
        ended = await scene.migrate(f"--to={new}")
        assert scene.rules() == before, scene.rules()
        await traffic.more()
    return ended


STORIES = {
    "moved": moved,
    "entered": entered,
    "left": left,
    "toured": toured,
    "beside": beside,
    "blocked": blocked,
}


def main(story, old, new, speed="fast"):
    isolate()
    lab = Lab()
    with TemporaryDirectory(prefix="pyproxy-move-") as folder:
        found = asyncio.run(found_out(lab, story, old, new, folder, SPEEDS[speed]))
        print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

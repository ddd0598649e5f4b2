"""A pod's containers in this namespace, made from its manifest as kubelet and runtime would.

crun is the runtime; the root file system is that of deploy/Dockerfile, with the checkout's pyproxy
in it. ``RuntimeDefault`` is Debian's profile for containers, which CRI-O and podman share, and
bpf(2) for CAP_BPF, as containerd 1.7 and Docker 23 have it.
"""

import asyncio
import json
import os
import platform
import re
import signal
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path

from tests.deploy.tools import ROOT, needed

IMAGE = ROOT / "build" / "image"
SECCOMP = Path("/usr/share/containers/seccomp.json")
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
PATIENCE_SECONDS = 120
# crun knows cgroups only where there is one hierarchy; it shall make none anyway.
CRUN = "umount -R /sys/fs/cgroup 2>/dev/null; mount -t cgroup2 none /sys/fs/cgroup; exec crun"


class Container:
    """A process that runs in a container."""

    def __init__(self, process, pid_file):
        self._process = process
        self._pid_file = pid_file
        self.log = ""

    async def until_logged(self, words):
        """Read the log until it has these words."""
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while words not in self.log:
                    line = await self._process.stdout.readline()
                    assert line, f"the container ended without {words!r}:\n{self.log}"
                    self.log += line.decode()
        except TimeoutError:
            raise AssertionError(f"not logged: {words!r}\n{self.log}") from None

    async def end(self):
        """Wait for the end; return the exit code."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            self.log += (await self._process.stdout.read()).decode()
            return await self._process.wait()

    async def stop(self):
        if self._process.returncode is None and self._pid_file.exists():
            os.kill(int(self._pid_file.read_text()), signal.SIGTERM)
        return await self.end()


class Pod:
    """A DaemonSet's pod on node ``here``. ``data`` has each ConfigMap's data, by name.

    ``host`` has what stands for paths of the host.
    """

    def __init__(self, daemonset, data, folder, account, host=()):
        self._spec = daemonset["spec"]["template"]["spec"]
        self._data = data
        self._folder = folder
        self._host = dict(host)
        self._runs = 0
        self._account = account  # the folder of the service account's files

    @asynccontextmanager
    async def running(self, container, *, without=()):
        """Run a container, by name, until the end of the block; less some capabilities."""
        self._runs += 1
        folder = self._folder / f"{container}-{self._runs}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self._runtime_spec(container, without)))
        pid_file = folder / "pid"
        words = f"{CRUN} --cgroup-manager=disabled --root={folder}/state run --pid-file={pid_file} "
        process = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "sh", "-c", words + f"{folder.name}-{os.getpid()}"),
            cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        running = Container(process, pid_file)
        try:
            yield running
        finally:
            await running.stop()

    # --- from the manifest to the runtime's configuration ---------------------------------------

    def _runtime_spec(self, name, without):
        containers = self._spec.get("initContainers", []) + self._spec["containers"]
        (container,) = (c for c in containers if c["name"] == name)
        security = container["securityContext"]
        privileged = security.get("privileged", False)
        capabilities = everything() if privileged else added(security, without)
        spec = default_spec(self._folder)
        spec["root"] = {
            "path": str(needed(IMAGE, "make image")),
            "readonly": security.get("readOnlyRootFilesystem", False),
        }
        spec["process"] |= {
            "terminal": False,
            "args": self._words(container),
            "env": [f"{k}={v}" for k, v in self._environment(container).items()],
            "noNewPrivileges": not security.get("allowPrivilegeEscalation", True),
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        }
        spec["mounts"] += self._mounts(container)
        linux = spec["linux"]
        linux["namespaces"] = [{"type": kind} for kind in ("mount", "pid", "ipc", "uts")]
        if privileged:
            linux["maskedPaths"] = linux["readonlyPaths"] = []
        elif "seccompProfile" in self._spec.get("securityContext", {}):
            linux["seccomp"] = runtime_default(capabilities)
        return spec

    def _environment(self, container):
        found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for source in container.get("envFrom", ()):
            found |= self._data[source["configMapRef"]["name"]]
        fields = {"spec.nodeName": "here"}
        for variable in container.get("env", ()):
            source = variable.get("valueFrom")
            found[variable["name"]] = (
                fields[source["fieldRef"]["fieldPath"]] if source else variable["value"]
            )
        return found

    def _words(self, container):
        environment = self._environment(container)
        words = container.get("command", ["pyproxy"]) + container.get("args", [])
        return [re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], word) for word in words]

    def _mounts(self, container):
        volumes = {volume["name"]: volume for volume in self._spec["volumes"]}
        mounts = [
            bind(self._account, SERVICE_ACCOUNT, read_only=True),
            bind(ROOT / "pyproxy", installed(), read_only=True),
        ]
        for mount in container["volumeMounts"]:
            source = self._source(volumes[mount["name"]]) / mount.get("subPath", "")
            if source.exists():  # this machine may have no /lib/modules
                read_only = mount.get("readOnly", False)
                mounts.append(bind(source, mount["mountPath"], read_only=read_only))
        return mounts

    def _source(self, volume):
        """Return where a volume's content is; ConfigMaps are written as kubelet does."""
        if "hostPath" in volume:
            path = volume["hostPath"]["path"]
            own = self._folder / path.replace("/", "-")  # not this machine's
            match volume["hostPath"].get("type"):
                case _ if path in self._host:
                    return self._host[path]
                case "FileOrCreate":
                    own.touch()
                case "DirectoryOrCreate":
                    own.mkdir(exist_ok=True)
                case _:
                    return Path(path)
            return own
        folder = self._folder / f"volume-{volume['name']}"
        if "emptyDir" in volume:
            folder.mkdir(exist_ok=True)
            return folder
        version = folder / "..2026_11_21"
        if not folder.exists():
            version.mkdir(parents=True)
            (folder / "..data").symlink_to(version.name)
            for key, text in self._data[volume["configMap"]["name"]].items():
                (version / key).write_text(text)
                (folder / key).symlink_to(f"..data/{key}")
        return folder


def default_spec(folder):
    """Return the configuration that the runtime proposes: mounts, masked and read-only paths."""
    path = folder / "config.json"
    if not path.exists():
        subprocess.Popen(["crun", "spec"], cwd=folder).wait()
    spec = json.loads(path.read_text())
    del spec["linux"]["resources"]
    return spec


def installed():
    """Return where the image has pyproxy."""
    (path,) = IMAGE.glob("opt/pyproxy/lib/python3*/site-packages/pyproxy")
    return "/" + str(path.relative_to(IMAGE))


def added(security, without):
    assert security["capabilities"]["drop"] == ["ALL"]
    return [f"CAP_{name}" for name in security["capabilities"]["add"] if name not in without]


def everything():
    """Return all capabilities there are, as far as we have them ourselves."""
    child = subprocess.Popen(["setpriv", "--list-caps"], stdout=subprocess.PIPE, text=True)
    names = child.communicate()[0].split()  # in the order of their numbers
    own = int(re.search(r"CapBnd:\s+(\w+)", Path("/proc/self/status").read_text())[1], 16)
    return [f"CAP_{name.upper()}" for number, name in enumerate(names) if own >> number & 1]


def bind(source, destination, *, read_only):
    options = ["rbind", "ro" if read_only else "rw"]
    return {
        "type": "bind",
        "source": str(source),
        "destination": str(destination),
        "options": options,
    }


def runtime_default(capabilities):
    """Return the default profile as it is for a container with these capabilities."""
    profile = json.loads(
        needed(SECCOMP, "apt-get install golang-github-containers-common").read_text()
    )
    own = set(capabilities)
    rules = [rule for rule in profile.pop("syscalls") if applies(rule, own)]
    if "CAP_BPF" in own:
        for rule in rules:
            rule["names"] = [name for name in rule["names"] if name != "bpf"]
        rules.append({"names": ["bpf"], "action": "SCMP_ACT_ALLOW"})
    fields = ("names", "action", "errnoRet", "args")
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "syscalls": [{f: rule[f] for f in fields if rule.get(f) is not None} for rule in rules],
    }


def applies(rule, capabilities):
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    arch = ARCHES[platform.machine()]
    return (
        set(includes.get("caps", ())) <= capabilities
        and arch in includes.get("arches", [arch])
        and not set(excludes.get("caps", ())) & capabilities
        and arch not in excludes.get("arches", ())
    )

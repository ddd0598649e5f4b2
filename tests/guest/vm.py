"""Run a command as root in a virtual machine, on the host's own file system.

For what the host's kernel may lack: ip_vs, SCTP, dummy devices. QEMU emulates the processor, at
about a tenth of its speed, so that it works where the host is a virtual machine itself. What the
command writes is gone afterwards. Its output and its exit status are passed on; 124 if it took too
long, 125 if the machine cannot boot.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.guest.kernel import CannotBoot, Kernel, cpio, prepared

TOO_LATE, NO_BOOT = 124, 125
QEMU = "qemu-system-x86_64"
VIRTIOFSD = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))
KEPT = ("CI", "HOME", "PATH")  # of the environment

START = """
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /run/netns /run/lock /lib/modules
mount -t devpts devpts /dev/pts; mount -t tmpfs shm /dev/shm
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin; ln -sfn fd/1 /dev/stdout; ln -sfn fd/2 /dev/stderr
ln -sfn {modules} /lib/modules/
ip link set lo up
stty -F /dev/ttyS1 raw
echo started > /dev/ttyS2
(cd {folder} && env -i {environment} {command}) < /dev/null > /dev/ttyS1 2>&1
echo $? > /dev/ttyS2
stty -F /dev/ttyS1 raw; stty -F /dev/ttyS2 raw  # which wait for what was written
echo o > /proc/sysrq-trigger; sleep 60
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=1200, metavar="SECONDS")
    parser.add_argument("--memory", default="2G")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # takes QEMU along
    try:
        if os.geteuid():
            raise CannotBoot("sharing the host's files with it needs root")
        kernel = prepared(Path(sys.prefix) / "guest")
        return in_guest(kernel, options.command, options.memory, options.timeout)
    except CannotBoot as error:
        sys.stderr.write(f"no virtual machine: {error}\n")
        return NO_BOOT


def in_guest(kernel: Kernel, command: Sequence[str], memory: str, seconds: float) -> int:
    """Boot, run the command, and return its exit status. Raises ``CannotBoot``."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        initramfs = kernel.initramfs.read_bytes() + cpio({"start": start(kernel, command).encode()})
        (folder / "initramfs").write_bytes(initramfs)
        sharing = share(folder / "files")
        try:
            machine = boot(kernel, folder, memory)
            try:
                machine.wait(seconds)
            except subprocess.TimeoutExpired:
                sys.stderr.write(f"the command took longer than {seconds:.0f} s\n")
                return TOO_LATE
            finally:
                machine.kill()
                machine.wait()
        finally:
            sharing.kill()
            sharing.wait()
        return status(folder)


def start(kernel: Kernel, command: Sequence[str]) -> str:
    kept = [f"{name}={os.environ[name]}" for name in KEPT if name in os.environ]
    kept.append("TERM=dumb")  # what it writes to is a serial port
    return START.format(
        modules=shlex.quote(str(kernel.modules)),
        folder=shlex.quote(str(Path.cwd())),
        environment=shlex.join(kept),
        command=shlex.join(command),
    )


def share(socket: Path) -> subprocess.Popen[bytes]:
    """Start the program through which the guest reads the host's files."""
    program = next((path for path in VIRTIOFSD if path.exists()), None)
    if program is None:
        raise CannotBoot("there is no virtiofsd: apt-get install virtiofsd or qemu-system-common")
    options = "source=/,sandbox=chroot,cache=always"
    log = (socket.parent / "sharing.log").open("wb")
    child = subprocess.Popen(
        [str(program), f"--socket-path={socket}", "-o", options], stdout=log, stderr=log
    )
    for _ in range(100):
        if socket.exists() or child.poll() is not None:
            break
        time.sleep(0.05)  # noqa: TID251  # there is no event loop here
    if not socket.exists():
        child.kill()
        said = (socket.parent / "sharing.log").read_text(errors="replace")
        raise CannotBoot(f"virtiofsd does not share the files: {said.strip()}")
    return child


def boot(kernel: Kernel, folder: Path, memory: str) -> subprocess.Popen[bytes]:
    """Start the machine. Serial ports: its console, the command's output, and its status."""
    argv = (
        f"{QEMU} -machine q35,memory-backend=memory -accel tcg,thread=multi -m {memory}"
        f" -object memory-backend-memfd,id=memory,size={memory},share=on -cpu qemu64,+rdrand"
        " -nodefaults -no-user-config -display none -no-reboot"
        f" -chardev socket,id=files,path={folder}/files"
        " -device vhost-user-fs-pci,chardev=files,tag=host"
        f" -chardev stdio,id=output,signal=off -serial file:{folder}/console"
        f" -serial chardev:output -serial file:{folder}/status"
        f" -kernel {kernel.image} -initrd {folder}/initramfs"
    ).split()
    arguments = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on audit=0"
    # On a busy host it misjudges the TSC's speed, and takes its timer for broken.
    arguments += " tsc=unstable clocksource=hpet no_timer_check"
    log = (folder / "machine.log").open("wb")
    try:
        return subprocess.Popen([*argv, "-append", arguments], stdin=subprocess.DEVNULL, stderr=log)
    except OSError as error:
        reason = f"cannot run {QEMU} ({error.strerror}): apt-get install qemu-system-x86"
        raise CannotBoot(reason) from error


def status(folder: Path) -> int:
    said = (folder / "status").read_text().split() if (folder / "status").exists() else []
    match said:
        case ["started", code]:
            return int(code)
        case ["started"]:
            reason = "it stopped before the command had ended"
        case _:
            reason = "it did not come up"
    logs = [(folder / name).read_text(errors="replace") for name in ("machine.log", "console")]
    tail = "\n".join(line for log in logs for line in log.splitlines()[-15:])
    raise CannotBoot(f"{reason}\n{tail}")


if __name__ == "__main__":
    sys.exit(main())

"""The root file system that deploy/Dockerfile makes; test_capabilities runs pods in it."""

import os
import subprocess
from pathlib import Path

import pytest

from pyproxy import __version__
from tests.deploy.tools import needed
from tests.netns.container import IMAGE

COMPILERS = ("cc", "gcc", "g++", "ld", "as", "make", "pip", "pip3")
MEGABYTES = 200  # 175 when it was made; a reason to look when it is more


def printed(*words):
    """Return what a program of the image prints, in the image."""
    needed(IMAGE, "make image")
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        ["chroot", IMAGE, *words], stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0, output
    return output


@pytest.mark.parametrize("name", ["pyproxy", "kube-proxy"])
def test_pyproxy_is_there_under_both_names(name, process_names):
    assert printed(f"/usr/local/bin/{name}", "--version") == f"pyproxy {__version__}\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("iptables-legacy", "(legacy)"),
        ("iptables-nft", "(nf_tables)"),
        ("ip6tables-legacy-restore", "(legacy)"),
        ("ip6tables-nft-restore", "(nf_tables)"),
        ("nft", "nftables v"),
        ("ipset", "ipset v"),
        ("modprobe", "kmod version"),
    ],
)
def test_the_programs_of_kernel_modes_are_there(program, words):
    assert words in printed(program, "--version")


def test_nothing_is_there_to_build_with():
    needed(IMAGE, "make image")
    folders = [IMAGE / f for f in ("usr/bin", "usr/sbin", "usr/local/bin", "opt/pyproxy/bin")]
    found = {name for folder in folders for name in os.listdir(folder)}
    assert found & set(COMPILERS) == set()


def test_it_is_as_small_as_the_documentation_says():
    needed(IMAGE, "make image")
    paths = [Path(folder, f) for folder, _, files in os.walk(IMAGE) for f in files]
    links = {(s.st_dev, s.st_ino): s.st_blocks for s in map(os.lstat, paths)}
    assert sum(links.values()) * 512 < MEGABYTES << 20

"""``pyproxy render``: what a mode would make of some files, or one line for each mistake."""

import asyncio
import os
import sys

import pytest

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])

WEB = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.244.1.1], nodeName: here}]
"""
TABLE = """\
SERVICE      ADDRESS            FOR        WHAT   BACKENDS
default/web  10.96.0.10:80/TCP  everybody  serve  10.244.1.1:8080
"""


async def pyproxy_render(*words, stdin=""):
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pyproxy", "render", *map(str, words),
        stdin=pipe, stdout=pipe, stderr=pipe,
    )  # fmt: skip
    output, errors = await process.communicate(stdin.encode())
    return process.returncode, output.decode(), errors.decode()


@pytest.fixture
def web(tmp_path):
    path = tmp_path / "web.yaml"
    path.write_text(WEB)
    return path


async def test_files_and_standard_input_give_the_same(web):
    for words, stdin in ((("-f", web), ""), (("--filename", web.parent), ""), (("-f", "-"), WEB)):
        assert await pyproxy_render("--mode", "userspace", *words, stdin=stdin) == (0, TABLE, "")


async def test_the_flags_of_the_node_count(web):
    flags = (
        "--node-name=here",
        "--cluster-cidr=10.244.0.0/16",
        "--nodeport-addresses=192.0.2.7/32",
    )
    code, output, errors = await pyproxy_render("-f", web, "--family", 4, *flags)
    assert (code, errors) == (0, "")
    assert output.startswith("add table ip pyproxy\ndelete table ip pyproxy\n")
    assert "ip6" not in output
    for line in ("ip saddr != 10.244.0.0/16", "\t\t\t192.0.2.7\n", "ip daddr 10.96.0.0/16 drop"):
        assert line in output


async def test_mode_ipvs_is_virtual_servers_and_the_table_beside_them(web):
    flags = ("--family=4", "--node-name=here", "--ipvs-scheduler=wlc")
    code, output, errors = await pyproxy_render("-f", web, "--mode=ipvs", *flags)
    assert (code, errors) == (0, "")
    servers, _, table = output.partition("\n\n")
    assert servers.splitlines() == [
        "-A -t 10.96.0.10:80 -s wlc -b flag-3",
        "-a -t 10.96.0.10:80 -r 10.244.1.1:8080 -m -w 1",
    ]
    assert table.startswith("add table ip pyproxy-ipvs\ndelete table ip pyproxy-ipvs\n")
    assert "10.96.0.10 . tcp . 80" in table


async def test_what_was_passed_over_is_told_and_no_error(web):
    web.write_text(f"{WEB}---\nkind: Secret\nmetadata: {{name: s}}\n")
    outcome = await pyproxy_render("-f", web, "--mode=userspace")
    assert outcome == (0, TABLE, "pyproxy: kind Secret is ignored\n")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        pytest.param(
            ["--mode=nftabels", "-f", "-"],
            'mode: "nftabels" is not one of auto, userspace, iptables, nftables, ipvs '
            "(did you mean nftables?)",
            id="no mode at all",
        ),
        pytest.param(
            [],
            "-f is missing: give a file or a directory of manifests, or - for stdin",
            id="no file",
        ),
        pytest.param(
            ["web.yaml"],
            'unexpected argument "web.yaml": there are only flags (pyproxy --help lists all flags)',
            id="a file without -f",
        ),
        pytest.param(["-f", "absent.yaml"], "absent.yaml: No such file or directory", id="absent"),
    ],
)
async def test_a_mistake_is_one_line(words, error):
    assert await pyproxy_render(*words) == (1, "", f"pyproxy: {error}\n")


async def test_each_bad_file_is_told_and_nothing_is_printed(tmp_path, web):
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text(
        "kind: Service\nmetadata: {name: b}\nspec: {ports: [{port: x}]}\n"
    )
    (tmp_path / "c.json").write_bytes(b"\xff")
    (tmp_path / ".hidden.yaml").write_text("a: [")
    code, output, errors = await pyproxy_render("-f", tmp_path)
    assert (code, output) == (1, "")
    told = [line.removeprefix(f"pyproxy: {tmp_path}{os.sep}") for line in errors.splitlines()]
    assert told[0].startswith("a.yaml: document 1: line ")
    assert told[1] == "c.json: byte 0 is not UTF-8"
    assert told[2].startswith("b.yaml: document 1: Service default/b: spec.ports[0].port: ")

"""What is asked of tables besides their rules: the same of programs, and of a library."""

import fcntl
import socket
import subprocess
import sys

import pytest

from pyproxy.proxier import _iptc
from pyproxy.proxier._flavour import Census, census, programs_of, tables_with
from pyproxy.proxier._iptables import Iptables, IptablesError, LegacyIptables
from pyproxy.proxier._iptarget import remove_chains
from pyproxy.proxier._others import Chains
from pyproxy.rules.iptables import Ruleset
from pyproxy.rules.iptables_base import CANARY, fixed_chains, jumps
from pyproxy.rules.iptables_text import founded, parsed
from tests.netns.test_iptables import FOREIGN, flush, output_of, without_counters

KINDS = [
    pytest.param((kind, family), id=f"{name}-IPv{family}")
    for name, kind in (("nft", "nft"), ("legacy", "legacy"), ("legacy by library", "library"))
    for family in (4, 6)
]


@pytest.fixture(params=KINDS)
async def tables(request):
    kind, family = request.param
    programs = programs_of(family)["nft" if kind == "nft" else "legacy"]
    flush(programs)
    if kind == "library":
        _iptc.load()
        assert _iptc.library() is not None, "pip install python-iptables"
    tables = (LegacyIptables if kind == "library" else Iptables)(programs)
    yield tables
    await tables.aclose()
    flush(programs)


def foundation(family, there):
    ruleset = Ruleset(family, localhost_node_ports=family == 4)
    return founded(there, fixed_chains(ruleset), jumps(ruleset))


async def laid(tables):
    there = parsed(await tables.save())
    await tables.arrange(foundation(tables.programs.family, there))
    return parsed(await tables.save())


async def test_what_is_laid_is_there_as_it_was_written(tables):
    there = await laid(tables)
    assert foundation(tables.programs.family, there) == []
    assert there["filter", "FORWARD"][0].endswith("-j KUBE-PROXY-FIREWALL")


async def test_chains_are_known_by_the_number_of_their_rules(tables):
    there = await laid(tables)
    for table in ("filter", "nat", "mangle"):
        expected = {chain: len(rules) for (t, chain), rules in there.items() if t == table}
        assert await tables.chains(table) == expected


async def test_the_canary_is_missed_when_it_is_gone(tables):
    assert not await tables.has_canary()
    await laid(tables)
    assert await tables.has_canary()
    await tables.arrange(["*mangle", f":{CANARY} - [0:0]", f"-X {CANARY}", "COMMIT"])
    assert not await tables.has_canary()


async def test_packets_are_counted_where_they_enter_our_chains(tables):
    await laid(tables)
    before = (await tables.packets("nat"))["KUBE-SERVICES"]
    kind = socket.AF_INET if tables.programs.family == 4 else socket.AF_INET6
    with socket.socket(kind, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"?", ("127.0.0.1" if tables.programs.family == 4 else "::1", 9))
    assert (await tables.packets("nat"))["KUBE-SERVICES"] > before
    assert "KUBE-PROXY-FIREWALL" in await tables.packets("filter")


async def test_a_line_that_is_wrong_changes_nothing_of_its_table(tables):
    before = await tables.chains("nat")
    with pytest.raises(IptablesError, match="nonsense"):
        await tables.arrange(["*nat", ":A - [0:0]", "-I OUTPUT -m nonsense -j A", "COMMIT"])
    assert await tables.chains("nat") == before


async def test_rules_of_others_keep_their_place_and_their_counters(tables):
    plain = tables.programs.plain
    counted = FOREIGN.replace("-A MINE", "[7:700] -A MINE").replace("\n-A", "\n[0:0] -A")
    output_of(tables.programs.restore, "--counters", text=counted)
    before = without_counters(await tables.save())
    counters = output_of(plain, "-w", "-v", "-S", "MINE")
    await laid(tables)
    with_ours = without_counters(await tables.save())
    assert [line for line in with_ours if line in before] == before
    assert output_of(plain, "-w", "-v", "-S", "MINE") == counters
    await remove_chains(tables)
    kept = [line for line in before if "KUBE-FIREWALL" not in line]
    assert [line for line in without_counters(await tables.save()) if line in kept] == kept
    assert output_of(plain, "-w", "-v", "-S", "MINE") == counters


ANY_BYTES = '-A FORWARD -m comment --comment "caf\udce9" -j KUBE-FORWARD'


async def with_a_jump_in_any_bytes(tables):
    await laid(tables)
    output_of(tables.programs.restore, "--noflush", text=f"*filter\n{ANY_BYTES}\nCOMMIT\n")
    before = without_counters(await tables.save())
    assert ANY_BYTES in before
    return before


async def test_a_jump_whose_comment_is_not_utf8_is_removed(tables):
    await with_a_jump_in_any_bytes(tables)
    assert (await tables.chains("filter"))["FORWARD"] > 1
    await remove_chains(tables)
    assert "KUBE-FORWARD" not in await tables.save()


async def test_a_jump_whose_comment_is_not_utf8_is_silenced_and_woken(tables):
    before = await with_a_jump_in_any_bytes(tables)
    other = Chains(tables, parsed("\n".join(before)))
    assert await other.silence()
    assert ANY_BYTES not in await tables.save()
    await other.wake()
    assert sorted(without_counters(await tables.save())) == sorted(before)


async def test_to_look_brings_no_table_into_being():
    """A namespace of its own: nobody has looked yet."""
    code = (
        "import sys; from pyproxy.proxier._flavour import chosen_flavour, programs_of, tables_with;"
        "import asyncio; from pyproxy.proxier import _iptc; chosen_flavour();"
        "ask = lambda p: asyncio.run(tables_with(p).chains('nat'));"
        "print([ask(programs_of(f)['legacy']) for f in (4, 6)], _iptc.existing(4));"
        "print('iptc' in sys.modules)"
    )
    assert output_of("unshare", "--net", sys.executable, "-c", code) == "[{}, {}] ()\nFalse\n"


# --- the library ----------------------------------------------------------------------------------


async def test_the_library_is_asked_once_it_is_loaded(monkeypatch):
    legacy = tables_with(programs_of(4)["legacy"])
    flush(legacy.programs)  # which brings its tables into being
    asked = []
    monkeypatch.setattr(_iptc, "chains", lambda family, table: asked.append(table) or {})
    monkeypatch.setattr(_iptc, "loaded", [])
    assert not await legacy.has_canary()
    assert asked == []
    _iptc.load()
    assert _iptc.library() is not None, "pip install python-iptables"
    assert not await legacy.has_canary()
    assert asked == ["mangle"]


def test_rules_and_signs_of_kubelet_are_counted():
    for flavour in ("nft", "legacy"):
        found = programs_of(4)[flavour]
        flush(found)
        output_of(found.restore, text=FOREIGN)
        assert census(found) == Census(FOREIGN.count("\n-A "), is_hinted=True)
        flush(found)


def test_the_lock_of_the_programs_is_waited_for(monkeypatch):
    _iptc.load()
    monkeypatch.setattr(_iptc, "LOCK_SECONDS", 0.1)
    with open(_iptc.LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(_iptc.LibraryError, match="somebody else"):
            _iptc.carry_out(4, ["*nat", ":A - [0:0]", "COMMIT"])
    _iptc.carry_out(4, ["*nat", ":A - [0:0]", "-X A", "COMMIT"])
    assert "A" not in _iptc.chains(4, "nat")


def test_programs_wait_for_the_library():
    restore = programs_of(4)["legacy"].restore
    with _iptc.locked():
        child = subprocess.Popen([restore, "-n", "-w", "5"], stdin=subprocess.PIPE, text=True)
        child.stdin.write("*nat\n:A - [0:0]\n-X A\nCOMMIT\n")
        child.stdin.close()
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.3)
    assert child.wait(timeout=10) == 0

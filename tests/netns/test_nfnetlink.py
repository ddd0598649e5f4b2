"""nf_tables in the kernel against nft, which has a packer, a parser and a printer of its own."""

import errno
import subprocess
import sys

import pytest

from pyproxy.proxier import _lifting
from pyproxy.proxier._nfnetlink import Generations, NfError, NfTables
from pyproxy.proxier._nfpack import (
    delete_chain,
    delete_elements,
    delete_set,
    delete_table,
    flush_chain,
    new_chain,
    new_elements,
    new_rule,
    new_set,
    new_table,
    rule_form,
    set_form,
)
from pyproxy.rules.nft import (
    Chain,
    Element,
    Hook,
    Masquerade,
    MatchProto,
    MatchSet,
    Pick,
    PickVerdict,
    Reject,
    Rule,
    Set,
    Table,
    Verdict,
    key_order,
    packed_key,
    packed_slot,
)
from pyproxy.rules.nft_text import text
from tests.nft_ruleset import OWNER, ruleset

TABLE = Table(4, "pyproxy")
ENDPOINTS = Set(
    "endpoints",
    ("ipv4_addr", "inet_proto", "inet_service", "slot"),
    ("ipv4_addr", "inet_service"),
)
FRONTEND = packed_key(ENDPOINTS.key[:3], ("10.96.0.1", "TCP", 80))


def nft(*arguments, stdin=""):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        ["nft", *arguments], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    output, _ = child.communicate(stdin, timeout=60)
    assert child.returncode == 0, output
    return output


@pytest.fixture(params=[4, 6])
def rules(request):
    return ruleset(request.param)


@pytest.fixture
def tables():
    nft("flush", "ruleset")
    tables = NfTables()
    yield tables
    tables.close()
    nft("flush", "ruleset")


def in_order(rules, name):
    key = next(a_set.key for a_set in rules.sets if a_set.name == name)
    return sorted(rules.elements.get(name, ()), key=lambda e: key_order(key, e.key))


def messages(rules):
    table = rules.table
    found = [new_table(table), *(new_chain(table, chain) for chain in rules.chains)]
    found += [new_set(table, a_set) for a_set in rules.sets]
    found += [new_rule(table, rule) for rule in rules.rules]
    for name in rules.elements:
        found += new_elements(table, name, in_order(rules, name))
    return found


def forms_by_chain(forms):
    found = {}
    for form in forms:
        found.setdefault(form.chain, []).append(form)
    return found


def endpoint(slot, port):
    data = packed_key(ENDPOINTS.data, ("10.0.0.1", port))
    return Element(FRONTEND + packed_slot(slot), data=data)


# --- Against nft ----------------------------------------------------------------------------------


def test_what_we_send_is_listed_as_what_the_text_says(rules, tables):
    nft("-f", "-", stdin=text(*rules))
    from_text = nft("list", "ruleset")
    nft("flush", "ruleset")
    tables.commit(messages(rules))
    assert nft("list", "ruleset") == from_text


def test_loading_the_text_again_changes_nothing(rules, tables):
    nft("-f", "-", stdin=text(*rules))
    once = nft("list", "ruleset")
    nft("-f", "-", stdin=text(*rules))
    assert nft("list", "ruleset") == once


def test_what_nft_lists_can_be_loaded(rules, tables):
    tables.commit(messages(rules))
    listed = nft("list", "ruleset")
    nft("flush", "ruleset")
    nft("-f", "-", stdin=listed)
    assert nft("list", "ruleset") == listed


def test_the_rules_nft_makes_of_the_text_are_ours(rules, tables):
    """But for two that it makes otherwise, see ``differs``."""

    def differs(form):
        names = [name for name, _ in form.expressions]
        return "hash" in names or form.chain == "guard"

    nft("-f", "-", stdin=text(*rules))
    made = [rule.form for rule in tables.rules(rules.table) if not differs(rule.form)]
    ours = [rule_form(rules.table, rule) for rule in rules.rules]
    assert forms_by_chain(made) == forms_by_chain(f for f in ours if not differs(f))


def test_the_sets_nft_makes_of_the_text_are_ours(rules, tables):
    nft("-f", "-", stdin=text(*rules))
    assert tables.sets(rules.table) == {s.name: set_form(rules.table, s) for s in rules.sets}


# --- Dumps ----------------------------------------------------------------------------------------


def test_chains_come_back(rules, tables):
    tables.commit(messages(rules))
    assert sorted(tables.chains(rules.table)) == sorted(rules.chains)


def test_sets_come_back(rules, tables):
    tables.commit(messages(rules))
    assert tables.sets(rules.table) == {s.name: set_form(rules.table, s) for s in rules.sets}


def test_rules_come_back_in_order(rules, tables):
    tables.commit(messages(rules))
    dumped = [rule.form for rule in tables.rules(rules.table)]
    sent = [rule_form(rules.table, rule) for rule in rules.rules]
    assert forms_by_chain(dumped) == forms_by_chain(sent)


def test_elements_come_back(rules, tables):
    tables.commit(messages(rules))
    found = {s.name: tables.elements(rules.table, s.name) for s in rules.sets}
    assert {name: set(some) for name, some in found.items()} == {
        s.name: set(rules.elements.get(s.name, ())) for s in rules.sets
    }


def test_a_rule_with_other_verdicts_in_its_own_map_differs(rules, tables):
    tables.commit(messages(rules))
    [rule] = [r for r in rules.rules if r.chain == OWNER and r.comment]
    [pick] = rule.statements
    other = Rule(
        rule.chain, (PickVerdict(pick.pick, tuple(reversed(pick.verdicts))),), rule.comment
    )
    forms = [found.form for found in tables.rules(rules.table)]
    assert rule_form(rules.table, rule) in forms
    assert rule_form(rules.table, other) not in forms


def test_a_map_of_a_rule_may_be_longer_than_a_message(tables):
    """An attribute has at most 64 KiB: about 1,500 endpoints of a Service with affinity."""
    targets = tuple(f"endpoint-{number:05}" for number in range(4000))
    pick = PickVerdict(Pick("random", 4000), tuple(Verdict("goto", name) for name in targets))
    rule = Rule("service", (pick,))
    chains = [new_chain(TABLE, Chain(name)) for name in (*targets, rule.chain)]
    tables.commit([new_table(TABLE), *chains, new_rule(TABLE, rule)])
    [found] = tables.rules(TABLE)
    assert found.form == rule_form(TABLE, rule)


def test_a_table_that_does_not_exist_has_nothing(tables):
    nowhere = Table(6, "nowhere")
    assert (tables.chains(nowhere), tables.sets(nowhere), tables.rules(nowhere)) == ([], {}, [])


def test_a_set_that_does_not_exist_is_an_error(tables):
    with pytest.raises(NfError, match="get elements of set x of ip pyproxy: ENOENT"):
        tables.elements(TABLE, "x")


def test_the_objects_of_other_tables_are_not_ours(tables):
    other = Table(4, "other")
    sent = [new_table(other), new_chain(other, Chain("input")), new_set(other, ENDPOINTS)]
    tables.commit([*sent, new_rule(other, Rule("input", (Reject(),))), new_table(TABLE)])
    assert (tables.chains(TABLE), tables.sets(TABLE), tables.rules(TABLE)) == ([], {}, [])


def test_100_000_elements_come_back(tables):
    sent = [endpoint(slot, slot % 50000) for slot in range(100_000)]
    tables.commit(
        [new_table(TABLE), new_set(TABLE, ENDPOINTS), *new_elements(TABLE, "endpoints", sent)]
    )
    assert set(tables.elements(TABLE, "endpoints")) == set(sent)


# --- Transactions ---------------------------------------------------------------------------------


@pytest.fixture
def filled(tables):
    chain = Rule("pick", (MatchProto("TCP"), Reject()), "first")
    elements = [endpoint(slot, 8080) for slot in range(3)]
    tables.commit(
        [
            new_table(TABLE),
            new_chain(TABLE, Chain("pick")),
            new_set(TABLE, ENDPOINTS),
            new_rule(TABLE, chain),
            *new_elements(TABLE, "endpoints", elements),
        ]
    )
    return tables


@pytest.mark.parametrize(
    ("refused", "code", "name"),
    [
        pytest.param(
            lambda: delete_elements(TABLE, "endpoints", [endpoint(7, 1)])[0],
            errno.ENOENT,
            "delete elements of set endpoints of ip pyproxy",
            id="an element that is not there",
        ),
        pytest.param(
            lambda: delete_chain(TABLE, "none"),
            errno.ENOENT,
            "delete chain none of ip pyproxy",
            id="a chain that is not there",
        ),
        pytest.param(
            lambda: delete_set(TABLE, "none"),
            errno.ENOENT,
            "delete set none of ip pyproxy",
            id="a set that is not there",
        ),
        pytest.param(
            lambda: new_elements(TABLE, "endpoints", [endpoint(0, 1)])[0],
            errno.EEXIST,
            "new elements of set endpoints of ip pyproxy",
            id="a key with other data",
        ),
        pytest.param(
            lambda: new_rule(TABLE, Rule("pick", (Verdict("goto", "none"),))),
            errno.ENOENT,
            "new rule pick of ip pyproxy",
            id="a verdict that leads nowhere",
        ),
        pytest.param(
            lambda: new_rule(TABLE, Rule("pick", (MatchSet(("daddr",), "endpoints"),))),
            errno.ENODATA,
            "new rule pick of ip pyproxy",
            id="a key longer than what was loaded",
        ),
    ],
)
def test_a_refused_message_is_named_and_changes_nothing(filled, refused, code, name):
    before = nft("list", "ruleset")
    good = new_elements(TABLE, "endpoints", [endpoint(9, 9)])
    with pytest.raises(NfError) as error:
        filled.commit(
            [*good, new_chain(TABLE, Chain("more")), refused(), flush_chain(TABLE, "pick")]
        )
    assert (error.value.errno, error.value.index) == (code, 2)
    assert f"message 2, {name}: {errno.errorcode[code]}" in str(error.value)
    assert nft("list", "ruleset") == before


def test_what_a_hook_may_not_reach_is_refused(filled):
    hooked = Chain("input", Hook("filter", "input", 0))
    jump = Rule("input", (Verdict("jump", "pick"),))
    masquerade = Rule("pick", (Masquerade(),))
    with pytest.raises(NfError) as error:
        filled.commit(
            [new_chain(TABLE, hooked), new_rule(TABLE, jump), new_rule(TABLE, masquerade)]
        )
    assert (error.value.errno, error.value.index) == (errno.EOPNOTSUPP, 2)
    assert filled.chains(TABLE) == [Chain("pick")]


def test_without_the_capability_the_transaction_as_a_whole_is_refused(tables):
    code = (
        "from pyproxy.proxier._nfnetlink import NfTables, NfError\n"
        "from pyproxy.proxier._nfpack import new_table\n"
        "from pyproxy.rules.nft import Table\n"
        "try: NfTables().commit([new_table(Table(4, 'pyproxy'))])\n"
        "except NfError as error: print(error, error.index)\n"
    )
    command = ["unshare", "--user", sys.executable, "-c", code]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output, _ = child.communicate(timeout=60)
    refused = "nf_tables: transaction as a whole: EPERM (Operation not permitted) None\n"
    assert output == refused
    assert nft("list", "ruleset") == ""


def emptying(nf):
    return delete_elements(TABLE, "endpoints", nf.elements(TABLE, "endpoints"))


def test_more_errors_than_the_buffer_holds_name_the_first(filled):
    missing = [m for i in range(20_000) for m in delete_elements(TABLE, "no", [endpoint(i, 1)])]
    with pytest.raises(NfError) as error:
        filled.commit(missing)
    assert (error.value.errno, error.value.index) == (errno.ENOENT, 0)
    filled.commit(emptying(filled))
    assert filled.elements(TABLE, "endpoints") == []


def test_an_element_is_replaced_within_one_transaction(filled):
    old, new = endpoint(1, 8080), endpoint(1, 9090)
    filled.commit(
        [*delete_elements(TABLE, "endpoints", [old]), *new_elements(TABLE, "endpoints", [new])]
    )
    assert set(filled.elements(TABLE, "endpoints")) == {endpoint(0, 8080), new, endpoint(2, 8080)}


def test_adding_what_is_there_is_no_error(filled):
    filled.commit(new_elements(TABLE, "endpoints", [endpoint(1, 8080)]))
    assert len(filled.elements(TABLE, "endpoints")) == 3


def test_an_empty_transaction_is_none(filled):
    before = filled.generation().id
    filled.commit([])
    assert filled.generation().id == before


def test_a_table_is_replaced_within_one_transaction(filled):
    filled.commit([new_table(TABLE), delete_table(TABLE), new_table(TABLE)])
    assert (filled.chains(TABLE), filled.sets(TABLE)) == ([], {})


def test_flushing_a_chain_leaves_it_empty(filled):
    filled.commit([flush_chain(TABLE, "pick")])
    assert (filled.chains(TABLE), filled.rules(TABLE)) == ([Chain("pick")], [])


def test_deleting_a_chain_deletes_its_rules(filled):
    filled.commit([delete_chain(TABLE, "pick"), delete_set(TABLE, "endpoints")])
    assert (filled.chains(TABLE), filled.sets(TABLE)) == ([], {})


# --- Inside of bridges ----------------------------------------------------------------------------


def test_nft_lists_the_rules_that_lift_answers_out_of_bridges(tables):
    """It reads none of them: version 1.0.6 fails at an address that is a map's."""
    _lifting.install(_lifting.whole(4, "lift", 0x1000, 130))
    listed = [line.strip() for line in nft("list", "table", "bridge", "lift-4").splitlines()]
    note, answer = "ip daddr . ip saddr . meta l4proto", "ip saddr . ip daddr . meta l4proto"
    look = f"ether daddr set {answer} . th sport . th dport map @answers"
    lift = "meta pkttype set host meta mark set meta mark | 0x00001000"
    assert [line for line in listed if "@" in line] == [
        "meta priority 7079:0 update @answers "
        f"{{ {note} . tcp dport . tcp sport timeout 1m30s : ether saddr }}",
        "meta priority 7079:0 update @answers "
        f"{{ {note} . udp dport . udp sport timeout 2m10s : ether saddr }}",
        f"{look} {lift} update @answers "
        f"{{ {answer} . udp sport . udp dport timeout 2m10s : ether daddr }}",
        f"ip frag-off & 16383 == 8192 {look} update @fragments "
        "{ ip saddr . ip daddr . ip id timeout 5s : ether daddr }",
        "ip frag-off & 8191 != 0 ether daddr set "
        f"ip saddr . ip daddr . ip id map @fragments {lift}",
    ]


# --- Generations ----------------------------------------------------------------------------------


def test_each_transaction_is_one_generation(filled):
    before = filled.generation().id
    filled.commit(emptying(filled))
    assert filled.generation().id == before + 1
    nft("add", "table", "ip", "other")
    assert filled.generation().id == before + 2


def test_a_listener_hears_who_made_a_generation_and_nothing_else(filled):
    listener = Generations()
    nft("add", "table", "ip", "other")
    filled.commit(new_elements(TABLE, "endpoints", [endpoint(9, 9)]))
    heard = listener.receive()
    listener.close()
    now = filled.generation()
    assert [generation.id for generation in heard] == [now.id - 1, now.id]
    assert heard[0].process == "nft"
    assert (heard[1].pid, heard[1].process) == (now.pid, now.process)

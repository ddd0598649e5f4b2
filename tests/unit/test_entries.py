"""What a mode has written, in words that two states can be compared by."""

import pytest
from msgspec.structs import replace

from pyproxy.comparison import EntryChange, entry_changes
from pyproxy.render import COMPILERS, entries_of
from pyproxy.rules import iptables
from pyproxy.rules.entries import Entry, entries, fixed_of_iptables
from pyproxy.rules.nft import packed_ip, packed_slot
from pyproxy.rules.nftables import SERVICE, Item, endpoint_data, port_key
from pyproxy.written import Entries, EntryRow, FamilyEntries
from tests.builders import address
from tests.scenarios.scenario import FILES, read

modes = pytest.mark.parametrize("mode", COMPILERS)
PATHS = {path.stem: path for path in FILES}


def of(mode, name, **kinds):
    scenario = read(PATHS[name])
    return entries_of(mode, scenario.objects | kinds, scenario.settings)


@modes
@pytest.mark.parametrize("name", PATHS)
def test_every_item_of_every_mode_has_words(mode, name):
    found = of(mode, name)
    assert entry_changes(found, found) == ()
    for family in found.families:
        names = [(row.kind, row.name) for row in family.entries]
        assert len(set(names)) == len(names), "one name, one content"


def test_the_name_of_a_service_may_be_left_out_of_rules_of_iptables():
    scenario = read(PATHS["cluster-ip"])
    for commented in (True, False):
        settings = replace(scenario.settings, commented=commented)
        found = str(entries_of("iptables", scenario.objects, settings))
        assert ('--comment "default/' in found) == commented


@modes
def test_what_goes_and_comes_is_told_in_both_directions(mode):
    with_pods, without = of(mode, "cluster-ip"), of(mode, "cluster-ip", EndpointSlice=())
    there, back = entry_changes(with_pods, without), entry_changes(without, with_pods)
    opposite = {"removed": "added", "added": "removed", "changed": "changed"}
    assert there
    assert [(opposite[c.change], c.kind, c.name, c.after, c.before) for c in there] == [
        (c.change, c.kind, c.name, c.before, c.after) for c in back
    ]


def test_another_mode_writes_everything_anew():
    changes = entry_changes(of("nftables", "cluster-ip"), of("ipvs", "cluster-ip"))
    found = {(change.change, change.kind) for change in changes}
    assert {("removed", "service-ips"), ("added", "virtual server")} <= found


def test_the_place_of_an_endpoint_among_others_means_nothing_and_the_number_does():
    front = packed_ip("10.96.0.1") + port_key("TCP", 80)

    def items(*endpoints):
        return {
            Item(SERVICE.endpoints, front + packed_slot(slot)): endpoint_data(address(number))
            for slot, number in enumerate(endpoints)
        }

    assert entries(4, items(1, 2)) == entries(4, items(2, 1))
    assert entries(4, items(1, 2, 1)) == (
        Entry("endpoints", "10.96.0.1 . tcp . 80 -> 10.244.1.1 . 8080", "2 places"),
        Entry("endpoints", "10.96.0.1 . tcp . 80 -> 10.244.1.2 . 8080"),
    )


def test_what_is_not_known_cannot_be_compared():
    known = Entries("nftables", (FamilyEntries(4, (EntryRow("chain", "x", "drop"),)),))
    unknown = Entries("nftables", (FamilyEntries(4, None),))
    assert entry_changes(unknown, known) is None
    assert entry_changes(known, Entries("nftables", (FamilyEntries(4, ()),))) == (
        EntryChange("removed", 4, "chain", "x", before="drop"),
    )


def with_settings(mode, **changes):
    scenario = read(PATHS["node-port"])
    settings = scenario.settings
    block = "nftables" if mode == "nftables" else "iptables"
    if bit := changes.pop("masquerade_bit", None):
        found = replace(getattr(settings.config, block), masquerade_bit=bit)
        changes[block] = found
    config = replace(settings.config, **changes)
    own = frozenset({"192.0.2.11", "192.0.2.12"})
    made = replace(settings, config=config, families=(4,), own_ips=own)
    return entries_of(mode, scenario.objects, made)


@pytest.mark.parametrize(
    ("changes", "touched"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param(
            {"masquerade_bit": 9},
            {
                "nftables": {"services", "nat-postrouting", "masquerade-marked"},
                "ipvs": {"services", "nat-postrouting", "masquerade-marked"},
                "iptables": {"filter KUBE-FORWARD", "nat KUBE-MARK-MASQ", "nat KUBE-POSTROUTING"},
            },
            id="the mark",
        ),
        pytest.param(
            {"cluster_cidr": "10.0.0.0/9"},
            {
                "nftables": {"services", "guard-strangers", "refuse-strangers", "drop-strangers"},
                "ipvs": {"services", "guard-strangers", "refuse-strangers", "drop-strangers"},
                "iptables": {"nat KUBE-SERVICES"},
            },
            id="the pods' network",
        ),
        pytest.param(
            {"node_port_addresses": ("192.0.2.12/32",)},
            {
                "nftables": {"192.0.2.11", "192.0.2.12"},
                "ipvs": {"192.0.2.11", "192.0.2.12"},
                "iptables": {"nat KUBE-SERVICES", "filter INPUT", "filter OUTPUT"},
            },
            id="addresses of node ports",
        ),
    ],
)
@pytest.mark.parametrize("mode", COMPILERS)
def test_rules_that_are_no_services_are_among_the_entries(mode, changes, touched):
    before, after = with_settings(mode), with_settings(mode, **changes)
    fixed = {"fixed chain", "jumps", "node-port-ips"}
    found = {c.name for c in entry_changes(before, after) if c.kind in fixed}
    assert found == touched.get(mode, set())


def test_what_the_kernel_decides_is_left_out():
    known = iptables.Ruleset(4, drop_invalid=False, random_fully=False, counted=True)
    assert fixed_of_iptables(known) == fixed_of_iptables(iptables.Ruleset(4))


def test_ranges_of_services_come_from_elsewhere_where_no_object_says_them():
    scenario = read(PATHS["node-port"])
    without = replace(scenario.settings, service_cidrs=())
    given = replace(without, service_cidrs=("10.96.0.0/12",))
    objects = scenario.objects | {"ServiceCIDR": ()}
    changes = entry_changes(*(entries_of("nftables", objects, s) for s in (without, given)))
    assert {change.name for change in changes} == {"cluster-ips-check"}

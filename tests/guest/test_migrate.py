"""``pyproxy migrate`` to and from mode ipvs; tests/netns has the moves that need no ip_vs."""

from tests.netns.test_migrate import RULES, told


def test_nothing_is_lost_on_a_tour_by_way_of_virtual_servers():
    """From nftables to ipvs, iptables, ipvs, userspace and ipvs, with one traffic."""
    found = told("toured", "nftables", "ipvs", "slow")
    output = found["output"]
    assert found["code"] == 0, output
    assert (found["failures"], found["lost"]) == ([], [])
    assert found["rules"] == RULES["ipvs"]
    assert output.count("virtual servers wait for the end of their connections") == 2
    assert output.count("to: userspace, by way of nftables") == 1
    assert output.count("connections of virtual servers, for ") >= 1
    assert "end now" not in output

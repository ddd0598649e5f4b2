"""``pyproxy migrate`` to and from mode ipvs; tests/netns has the moves that need no ip_vs."""

import pytest

from tests.netns.test_migrate import RULES, told


@pytest.mark.parametrize(("old", "new"), [("nftables", "ipvs"), ("ipvs", "nftables")])
def test_nothing_is_lost_on_the_way(old, new):
    """Connections of before go on through virtual servers that get no new ones."""
    found = told("moved", old, new, "slow")
    assert found["code"] == 0, found["output"]
    assert (found["failures"], found["lost"]) == ([], [])
    assert found["rules"] == RULES[new]
    waits = "virtual servers wait for the end of their connections"
    assert (waits in found["output"]) is (old == "ipvs")

"""The fixed part of table ``pyproxy`` beside another proxy: its filters look before theirs.

A proxy drops what goes to the Services' ranges and to no Service that it knows. What ours refuse
must have been refused by then.
"""

from pyproxy.rules import nft_base
from pyproxy.rules.nft import Chain
from pyproxy.rules.nft_base import FILTER, TABLE_NAME, rules, sets, table

__all__ = ["CHAINS", "TABLE_NAME", "rules", "sets", "table"]


def earlier(chain: Chain) -> Chain:
    if chain.hook is None or chain.hook.priority != FILTER:
        return chain
    return chain._replace(hook=chain.hook._replace(priority=FILTER - 1))


CHAINS = tuple(map(earlier, nft_base.CHAINS))

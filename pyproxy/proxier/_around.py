"""Which addresses are this node's, and which its pods', as its interfaces are now."""

from collections.abc import Callable
from functools import partial

from pyproxy.config import local_cidr
from pyproxy.host import LOOPBACK
from pyproxy.model import Network
from pyproxy.proxier import Env
from pyproxy.rules.listeners import Surroundings


def surroundings(env: Env) -> Surroundings:
    own = env.host.snapshot.ips(env.family)
    return Surroundings(own, pod_networks(env), (LOOPBACK[env.family],))


def pod_networks(env: Env) -> tuple[Network, ...]:
    """Return the networks of local pods, however they are recognised."""
    detect = env.config.detect_local
    matches: Callable[[str], bool]
    match env.config.detect_local_mode:
        case "BridgeInterface":
            matches = detect.bridge_interface.__eq__
        case "InterfaceNamePrefix":
            matches = partial(has_prefix, detect.interface_name_prefix)
        case _:
            cidr = local_cidr(env.config, env.family, env.node)
            return (cidr,) if cidr is not None else ()
    return env.host.snapshot.networks(env.family, matches)


def has_prefix(prefix: str, name: str) -> bool:
    return name.startswith(prefix)

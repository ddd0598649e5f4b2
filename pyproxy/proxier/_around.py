"""Which addresses are this node's, and which its pods', as its interfaces are now."""

from collections.abc import Callable
from functools import partial

from pyproxy.config import local_cidr, local_pods, node_port_cidrs
from pyproxy.host import LOOPBACK
from pyproxy.ip import is_loopback
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


def pods_of(env: Env, any_suffix: str) -> Network | str | None:
    """Return how rules recognise local pods: their network, or interface (perhaps a pattern)."""
    return local_pods(env.config, env.family, env.node, any_suffix)


def node_port_ips(env: Env, *, loopback: bool = False) -> tuple[str, ...] | None:
    """Return the node's addresses that serve node ports, in order; None is every one it has."""
    ranges = node_port_cidrs(env.config, env.family, env.node_ips)
    if ranges is None:
        return None
    found = env.host.snapshot.ips_in(env.family, ranges)
    return tuple(ip for ip in found if loopback or not is_loopback(ip))


def has_prefix(prefix: str, name: str) -> bool:
    return name.startswith(prefix)

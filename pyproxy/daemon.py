"""What the running process tells commands: its parts as one view, and what only it can find out."""

from collections.abc import Mapping, Sequence

from pyproxy.config import Config, gate, node_port_cidrs
from pyproxy.control import LiveQuestion
from pyproxy.lane import Lane
from pyproxy.model import Family
from pyproxy.plan import Site
from pyproxy.proxier import Env
from pyproxy.proxier._around import surroundings
from pyproxy.reconcile import Proxier
from pyproxy.rules.listeners import Surroundings
from pyproxy.topology import Place
from pyproxy.view import FamilyView, View


class Daemon:
    """Answers for the lanes of a process. What is asked changes nothing."""

    def __init__(self, node: str, config: Config, lanes: Sequence[Lane]) -> None:
        self._node = node
        self._config = config
        self._lanes = lanes
        self._carriers: dict[Family, tuple[Env, Proxier]] = {}

    def carries(self, env: Env, carrier: Proxier) -> None:
        """Take in who writes a family's plan, once it is known."""
        self._carriers[env.family] = (env, carrier)

    def view(self) -> View:
        return View(
            node=self._node,
            mode=self._config.mode,
            families=tuple(self._family(lane) for lane in self._lanes),
            allow_external_ips=gate(self._config, "AllowServiceExternalIPs"),
        )

    def live(self) -> Mapping[str, LiveQuestion]:
        """Return what is asked about more than the state, by its path."""
        return {}

    def _family(self, lane: Lane) -> FamilyView:
        known = self._carriers.get(lane.family)
        env = known[0] if known is not None else None
        return FamilyView(
            family=lane.family,
            cache=lane.cache,
            plan=lane.plan,
            site=lane.site or Site(Place(self._node)),
            around=surroundings(env) if env is not None else Surroundings(),
            node_port_ips=node_port_ips(env) if env is not None else frozenset(),
            progress=lane.progress,
        )


def node_port_ips(env: Env) -> frozenset[str]:
    """Return the addresses of this node that serve node ports."""
    ranges = node_port_cidrs(env.config, env.family, env.node_ips)
    seen = env.host.snapshot
    own = seen.ips(env.family) if ranges is None else frozenset(seen.ips_in(env.family, ranges))
    on_loopback = env.config.mode in ("userspace", "iptables") and (
        env.config.iptables.localhost_node_ports
    )
    return own if on_loopback else frozenset(ip for ip in own if not is_loopback(ip))


def is_loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip == "::1"

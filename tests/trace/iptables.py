"""The fate of a packet by the rules of mode iptables: it walks through them as in the kernel.

The rules are read as ``iptables-save`` prints them. Where one picks, by chance, in turn or by the
client's address, every pick is followed.
"""

import shlex
from fnmatch import fnmatchcase
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from pyproxy.model import Address
from pyproxy.rules.iptables import SETS, compile_owner, picks, set_name
from pyproxy.rules.iptables_base import ANTI_SPOOF, HOST_FIREWALL, jumps
from pyproxy.rules.iptables_layout import chains_of
from tests.trace.cbpf import program_of, verdict
from tests.trace.kernel import arrived, dnatted, united

PICK = "pick"  # it may match or not


class Match(NamedTuple):
    option: str
    values: tuple[str, ...]
    is_inverted: bool


class Rule(NamedTuple):
    matches: tuple[Match, ...]
    target: str
    options: tuple[str, ...]  # of the target
    returns: bool  # after a chain: by a jump; not by a goto


class Rules:
    """The chains of a family, and the members of its sets."""

    def __init__(self, ruleset, ports):
        items = {}
        for port in ports:
            items |= compile_owner(ruleset, port, {})
        self.sets = {}
        for item in items:
            if item.table == SETS:
                self.sets.setdefault(set_name(item.chain, ruleset.family), set()).add(item.match)
        self.chains = {
            place: list(map(parsed, rules)) for place, rules in chains_of(ruleset, items).items()
        }
        self.chains["filter", HOST_FIREWALL] = [parsed(ANTI_SPOOF)]
        for jump in jumps(ruleset):
            self.chains.setdefault((jump.table, jump.chain), []).insert(0, parsed(jump.rule))
        self.known = set()  # clients, each with the list that remembers it

    def remember(self, client, backend):
        """Let the lists of clients of this backend hold the client."""
        for rules in self.chains.values():
            for rule in rules:
                if rule.target == "DNAT" and str(backend) in rule.options:
                    names = [m.values[0] for m in rule.matches if m.option == "--name"]
                    self.known |= {(name, client) for name in names}

    # --- the way through the kernel -----------------------------------------------------------

    def fate(self, packet, world):
        state = arrived(packet)
        go = self._sent if packet.sender.is_here else self._received
        return united(set(go(state, world)))

    def _sent(self, state, world):
        """What a process sends to its own node comes in again, through loopback.

        Its addresses are translated by then: NAT does not look at it a second time.
        """
        hooks = [("nat", "OUTPUT"), ("filter", "OUTPUT"), ("nat", "POSTROUTING")]
        for end, at in self._pass(hooks, state, world):
            if end == "accept" and world.is_local(at.daddr):
                yield from self._pass([("filter", "INPUT")], at._replace(interface="lo"), world)
            else:
                yield end, at

    def _received(self, state, world):
        for end, at in self._pass([("nat", "PREROUTING")], state, world):
            hooks = [("filter", "FORWARD"), ("nat", "POSTROUTING")]
            if world.is_local(at.daddr):
                hooks = [("filter", "INPUT")]
            yield from self._pass(hooks, at, world) if end == "accept" else [(end, at)]

    def _pass(self, hooks, state, world):
        """Yield what becomes of a packet in these chains of the kernel's own."""
        if not hooks:
            yield "accept", state
            return
        first, *rest = hooks
        for end, at in self._rules(first, 0, state, world):
            if end in ("end", "accept"):
                yield from self._pass(rest, at, world)
            else:
                yield end, at

    def _rules(self, place, start, state, world):
        """Yield the verdicts of a chain from a rule on; ``end`` where it or RETURN ends it."""
        rules = self.chains.get(place, [])
        for number in range(start, len(rules)):
            rule = rules[number]
            found = self._matches(rule, state, world)
            if found == PICK:
                yield from self._rules(place, number + 1, state, world)
            if found:
                yield from self._hit(rule, place, number, state, world)
                return
        yield "end", state

    def _hit(self, rule, place, number, state, world):
        match rule.target:
            case "ACCEPT" | "DROP" | "REJECT":
                yield rule.target.lower(), state
            case "RETURN":
                yield "end", state
            case "DNAT":
                yield "accept", dnatted(state, address_of(rule.options[1]))
            case "MASQUERADE":
                yield "accept", state._replace(is_masqueraded=True)
            case "MARK":
                value, mask = numbers(rule.options[1])
                marked = state._replace(mark=state.mark & ~mask ^ value)
                yield from self._rules(place, number + 1, marked, world)
            case "":
                yield from self._rules(place, number + 1, state, world)
            case chain:
                yield from self._entered(chain, rule, place, number, state, world)

    def _entered(self, chain, rule, place, number, state, world):
        assert (place[0], chain) in self.chains, f"a jump to nowhere: {chain}"
        for end, at in self._rules((place[0], chain), 0, state, world):
            if end == "end" and rule.returns:
                yield from self._rules(place, number + 1, at, world)
            else:
                yield end, at

    # --- matches ------------------------------------------------------------------------------

    def _matches(self, rule, state, world):
        """Say whether all match; PICK where that depends on what nobody can foresee."""
        picked = False
        for match in rule.matches:
            found = self._holds(match, rule, state, world)
            if found == PICK:
                picked = True
            elif found == match.is_inverted:
                return False
        return PICK if picked else True

    def _holds(self, match, rule, state, world):
        if match.option in PACKET:
            return PACKET[match.option](match.values[0], state, world)
        match match.option:
            case "--match-set":
                name, flags = match.values
                return member(state, flags) in self.sets.get(name, ())
            case "--rcheck":
                return (option(rule, "--name"), state.saddr) in self.known
            case "--mode" | "--bytecode":
                return PICK
        assert match.option in IRRELEVANT, f"not understood: {match}"
        return True


# What options say of a packet; each has one value.
PACKET = {
    "-s": lambda text, state, world: ip_address(state.saddr) in network_of(text),
    "-d": lambda text, state, world: ip_address(state.daddr) in network_of(text),
    "-p": lambda text, state, world: state.proto.lower() == text,
    "-i": lambda text, state, world: fnmatchcase(state.interface, text.replace("+", "*")),
    "--dport": lambda text, state, world: state.dport == int(text),
    "--src-type": lambda text, state, world: world.is_local(state.saddr),
    "--dst-type": lambda text, state, world: world.is_local(state.daddr),
    "--ctstate": lambda text, state, world: bool(states_of(state) & set(text.split(","))),
    "--mark": lambda text, state, world: state.mark & numbers(text)[1] == numbers(text)[0],
}
# Options that say more of a match that has been looked at, or nothing of packets.
IRRELEVANT = {
    *("-m", "--comment", "--name", "--mask", "--rsource", "--set", "--seconds", "--reap"),
    *("--every", "--packet", "--probability", "--nfacct-name", "--ctorigdst"),
}


@lru_cache(maxsize=4096)
def parsed(text):
    """Return a rule as its options. Each has the values up to the next."""
    words = shlex.split(text)
    found, inverted = [], False
    while words:
        word = words.pop(0)
        if word == "!":
            inverted = True
            continue
        values = []
        while words and not words[0].startswith("-") and words[0] != "!":
            values.append(words.pop(0))
        found.append(Match(word, tuple(values), inverted))
        inverted = False
    ends = [n for n, match in enumerate(found) if match.option in ("-j", "-g")]
    if not ends:
        return Rule(tuple(found), "", (), returns=True)
    [end] = ends
    options = [word for match in found[end + 1 :] for word in (match.option, *match.values)]
    [target] = found[end].values
    return Rule(tuple(found[:end]), target, tuple(options), returns=found[end].option == "-j")


def states_of(state):
    """Return those of connection tracking, for the first packet of a connection."""
    return {"NEW", "DNAT"} if state.is_dnatted else {"NEW"}


def option(rule, name):
    return next(match.values[0] for match in rule.matches if match.option == name)


@lru_cache(maxsize=4096)
def network_of(text):
    return ip_network(text)


def numbers(text):
    value, _, mask = text.partition("/")
    return int(value, 16), int(mask, 16) if mask != "0x0" else 0


def member(state, flags):
    """Return what a set is asked for: addresses, the second of which has the port."""
    fields = {
        "dst,dst": f"{state.daddr},{state.proto.lower()}:{state.dport}",
        "dst,dst,src": f"{state.daddr},{state.proto.lower()}:{state.dport},{state.saddr}",
    }
    return fields[flags]


def address_of(text):
    ip, _, port = text.rpartition(":")
    return Address(ip.strip("[]"), int(port))


def chosen(pool, owner, client):
    """Return the backend that the rules of a scheduler by client give a client."""
    for match, found in picks(pool, owner):
        if "--bytecode" not in match or verdict(program_of(match.split('"')[1]), client):
            return found
    raise AssertionError("the last rule takes all")

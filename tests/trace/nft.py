"""The fate of a packet by the rules of mode nftables: it walks through them as in the kernel.

Where a rule picks at random, every pick is followed.
"""

from fnmatch import fnmatchcase
from ipaddress import ip_address
from types import MappingProxyType

from pyproxy.model import Address
from pyproxy.rules import nft_base
from pyproxy.rules.nft import (
    PROTO_NUMBERS,
    AddressMatch,
    Dnat,
    DnatPick,
    Element,
    Masquerade,
    MatchDnat,
    MatchInput,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchProto,
    MatchSet,
    MatchState,
    PickVerdict,
    Reject,
    SetMark,
    StateMatch,
    ToggleMark,
    UpdateSet,
    Verdict,
    VerdictMap,
    fields_of,
    packed_ip,
    packed_slot,
    unpacked_key,
)
from pyproxy.rules.nftables import PRESENT, compile_owner
from tests.trace.kernel import arrived, dnatted, united

NOTHING = MappingProxyType({})


class Rules:
    """The table of a family: its chains, and what is in its sets and maps."""

    def __init__(self, ruleset, ports, before=NOTHING):
        """``before`` has the items that owners had, and that theirs grow out of."""
        self.types = {a_set.name: a_set for a_set in nft_base.sets(ruleset.family)}
        self.elements = {name: {} for name in self.types}
        self.chains = {chain.name: [] for chain in nft_base.CHAINS}
        self.hooks = [chain for chain in nft_base.CHAINS if chain.hook]
        for rule in nft_base.rules(ruleset):
            self.chains[rule.chain].append(rule)
        for ip in ruleset.node_port_ips or ():
            self.elements["node-port-ips"][packed_ip(ip)] = PRESENT
        for port in ports:
            self._add(compile_owner(ruleset, port, before.get(port.owner, {})))

    def _add(self, items):
        for item, content in items.items():
            if item.container == "chain":
                assert self.chains.get(item.key) in (None, list(content)), "one chain, two contents"
                self.chains[item.key] = list(content)
            elif item.container == "affinity-set":
                self.types[item.key] = content
                self.elements.setdefault(item.key, {})
            else:
                self.elements[item.container][item.key] = content

    def remember(self, client, backend):
        """Let the sets of clients of this backend hold the client."""
        for rules in self.chains.values():
            ends = [s for rule in rules for s in rule.statements if isinstance(s, Dnat)]
            if Dnat(backend) in ends:
                updated = [s for rule in rules for s in rule.statements if isinstance(s, UpdateSet)]
                for update in updated:
                    self.elements[update.set][packed_ip(client)] = PRESENT

    # --- the way through the kernel -----------------------------------------------------------

    def fate(self, packet, world):
        return united(set(self._journey(arrived(packet), packet.sender, world)))

    def _journey(self, state, sender, world):
        first = "output" if sender.is_here else "prerouting"
        go_on = self._after_output if sender.is_here else self._after_prerouting
        for verdict, at in self._pass([first], state, world):
            if verdict == "accept":
                yield from go_on(at, world)
            else:
                yield verdict, at

    def _after_output(self, state, world):
        """What a process sends to its own node comes in again, through loopback.

        Its addresses are translated by then: NAT does not look at it a second time.
        """
        for verdict, at in self._pass(["postrouting"], state, world):
            if verdict == "accept" and world.is_local(at.daddr):
                again = at._replace(interface="lo")
                yield from self._pass(["prerouting", "input"], again, world, nat=False)
            else:
                yield verdict, at

    def _after_prerouting(self, state, world):
        here = world.is_local(state.daddr)
        return self._pass(["input"] if here else ["forward", "postrouting"], state, world)

    def _pass(self, hooks, state, world, *, nat=True):
        """Yield what becomes of a packet in the base chains of these hooks."""
        chains = [
            chain
            for hook in hooks
            for chain in sorted(self.hooks, key=lambda chain: chain.hook.priority)
            if chain.hook.hook == hook and (nat or chain.hook.type != "nat")
        ]
        ways = [("accept", state)]
        for chain in chains:
            after = []
            for verdict, at in ways:
                if verdict == "accept":
                    after += list(self._chain(chain.name, at, world))
                else:
                    after.append((verdict, at))
            ways = after
        return ways

    def _chain(self, name, state, world):
        """Yield the verdicts of a base chain; its end is ``accept``."""
        for verdict, at in self._rules(self.chains[name], state, world):
            yield ("accept" if verdict in ("return", "end") else verdict), at

    def _rules(self, rules, state, world):
        """Yield the verdicts of rules, ``end`` where none of them has one."""
        if not rules:
            yield "end", state
            return
        rule, *rest = rules
        for verdict, at in self._statements(rule.statements, state, world):
            match verdict:
                case None:
                    yield from self._rules(rest, at, world)
                case Verdict("goto", chain):
                    yield from self._rules(self.chains[chain], at, world)
                case Verdict("jump", chain):
                    yield from self._jump(chain, rest, at, world)
                case Verdict(kind):
                    yield kind, at
                case _:
                    yield verdict, at

    def _jump(self, chain, rest, state, world):
        for verdict, at in self._rules(self.chains[chain], state, world):
            if verdict in ("return", "end"):
                yield from self._rules(rest, at, world)
            else:
                yield verdict, at

    def _statements(self, statements, state, world):
        """Yield the rule's verdict, None to go on with the next rule, for every pick."""
        if not statements:
            yield None, state
            return
        first, *rest = statements
        if isinstance(first, AddressMatch | StateMatch):
            if self._matches(first, state, world):
                yield from self._statements(rest, state, world)
            else:
                yield None, state
        elif isinstance(first, SetMark | ToggleMark | UpdateSet):
            yield from self._statements(rest, changed(first, state), world)
        else:
            yield from self._ending(first, state)

    def _ending(self, statement, state):
        match statement:
            case PickVerdict(_pick, verdicts):
                yield from ((verdict, state) for verdict in verdicts)
            case DnatPick():
                yield from self._picked(statement, state)
            case Dnat(address):
                yield "accept", dnatted(state, address)
            case Masquerade():
                yield "accept", state._replace(is_masqueraded=True)
            case Reject():
                yield "reject", state
            case Verdict():
                yield statement, state
            case VerdictMap(fields, name):
                element = self.elements[name].get(packed(fields, state))
                yield (element.data if element is not None else None), state

    def _picked(self, statement, state):
        """A slot without an element ends the rule, and the packet goes on."""
        name = statement.map
        for slot in range(statement.pick.count):
            data = self.elements[name].get(packed(statement.fields, state) + packed_slot(slot))
            if data is None:
                yield None, state
            else:
                yield "accept", dnatted(state, Address(*unpacked_key(self.types[name].data, data)))

    def _matches(self, statement, state, world):
        if isinstance(statement, StateMatch):
            return state_matches(statement, state)
        match statement:
            case MatchNetwork(field, network, inside):
                return (ip_address(getattr(state, field)) in network) == inside
            case MatchSet(fields, name, inside):
                return self._holds(name, packed(fields, state)) == inside
            case MatchInput(interface, same):
                return fnmatchcase(state.interface, interface) == same
            case MatchLocal(field):
                return world.is_local(getattr(state, field))

    def _holds(self, name, key):
        if key in self.elements[name]:
            return True
        a_set = self.types[name]
        if "interval" not in a_set.flags:
            return False
        wanted = list(fields_of(a_set.key, key))
        return any(
            all(
                low <= value <= high
                for low, value, high in zip(
                    fields_of(a_set.key, element.key),
                    wanted,
                    fields_of(a_set.key, element.key_end),
                    strict=True,
                )
            )
            for element in self.elements[name].values()
            if isinstance(element, Element) and element.key_end is not None
        )


def state_matches(statement, state):
    """The packet is the first of its connection."""
    match statement:
        case MatchState(wanted):
            return wanted == "new"
        case MatchDnat():
            return state.is_dnatted
        case MatchMark(bits):
            return state.mark & bits == bits
        case MatchProto(proto):
            return state.proto == proto


def packed(fields, state):
    if len(fields) == 1:
        return packed_field(fields[0], state)
    values = [packed_field(field, state) for field in fields]
    return b"".join(value.ljust(len(value) + 3 & ~3, b"\0") for value in values)


def packed_field(field, state):
    match field:
        case "saddr" | "daddr":
            return packed_ip(getattr(state, field))
        case "l4proto":
            return bytes([PROTO_NUMBERS[state.proto]])
        case "dport":
            return state.dport.to_bytes(2, "big")


def changed(statement, state):
    match statement:
        case SetMark(bits):
            return state._replace(mark=state.mark | bits)
        case ToggleMark(bits):
            return state._replace(mark=state.mark ^ bits)
        case UpdateSet(name):
            return state._replace(remembered=state.remembered | {name})

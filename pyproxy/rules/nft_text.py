"""A table as a file for ``nft -f``, which replaces the table as a whole."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from pyproxy.rules.nft import (
    AddressMatch,
    Chain,
    Change,
    Counter,
    Dnat,
    DnatPick,
    Element,
    Ending,
    Field,
    FrameChange,
    FrameMatch,
    Masquerade,
    MatchDnat,
    MatchFamily,
    MatchFragment,
    MatchInput,
    MatchLocal,
    MatchMark,
    MatchNetwork,
    MatchPriority,
    MatchProto,
    MatchSet,
    MatchState,
    MatchSyn,
    MatchTransparent,
    Pick,
    PickVerdict,
    Readdress,
    Reject,
    Rule,
    Set,
    SetMark,
    StateMatch,
    Statement,
    Table,
    TakeFrame,
    ToggleMark,
    Tproxy,
    TypeName,
    Types,
    UpdateMap,
    UpdateSet,
    Verdict,
    VerdictMap,
    clipped,
    key_order,
    key_text,
)


def text(
    table: Table,
    chains: Iterable[Chain],
    sets: Iterable[Set],
    rules: Iterable[Rule],
    elements: Mapping[str, Sequence[Element]],
) -> str:
    """Return the file. Chains, sets and rules keep their order; elements are sorted by key."""
    rules_by_chain: dict[str, list[Rule]] = {}
    for rule in rules:
        rules_by_chain.setdefault(rule.chain, []).append(rule)
    head = f"table {'bridge' if table.bridge else _ip(table)} {table.name}"
    blocks = [[f'\tcomment "{clipped(table.comment)}"']] if table.comment else []
    blocks += [list(_set_lines(table, s, elements.get(s.name, ()))) for s in sets]
    blocks += [list(_chain_lines(table, c, rules_by_chain.get(c.name, ()))) for c in chains]
    body = "\n\n".join("\n".join(block) for block in blocks)
    return f"add {head}\ndelete {head}\n{head} {{\n{body}\n}}\n"


def rule_text(table: Table, rule: Rule) -> str:
    """Return a rule as one line."""
    words = [statement_text(table, statement) for statement in rule.statements]
    if rule.comment:
        words.append(f'comment "{clipped(rule.comment)}"')
    return " ".join(words)


def statement_text(table: Table, statement: Statement) -> str:
    match statement:
        case MatchNetwork() | MatchSet() | MatchInput() | MatchLocal():
            return _address_match_text(table, statement)
        case MatchFamily() | MatchPriority() | MatchFragment():
            return _frame_match_text(table, statement)
        case UpdateMap() | Readdress() | TakeFrame():
            return _frame_change_text(table, statement)
        case (
            MatchState()
            | MatchDnat()
            | MatchMark()
            | MatchProto()
            | MatchTransparent()
            | MatchSyn()
        ):
            return _state_match_text(statement)
        case SetMark() | ToggleMark() | Dnat() | DnatPick() | UpdateSet():
            return _change_text(table, statement)
        case _:
            return _ending_text(table, statement)


def _address_match_text(table: Table, statement: AddressMatch) -> str:
    match statement:
        case MatchNetwork(field, network, inside):
            where = network if network.num_addresses > 1 else network.network_address
            return f"{_field_text(table, field)} {'' if inside else '!= '}{where}"
        case MatchSet(fields, name, inside):
            return f"{_fields_text(table, fields)} {'' if inside else '!= '}@{name}"
        case MatchInput(interface, same):
            return f'iifname {"" if same else "!= "}"{interface}"'
        case MatchLocal(field):
            return f"fib {field} type local"


def _state_match_text(statement: StateMatch) -> str:
    match statement:
        case MatchState(state):
            return f"ct state {state}"
        case MatchDnat():
            return "ct status dnat"
        case MatchMark(bits):
            return f"meta mark and {bits:#x} == {bits:#x}"
        case MatchProto(proto):
            return f"meta l4proto {proto.lower()}"
        case MatchTransparent():
            return "socket transparent 1"
        case MatchSyn():
            return "tcp flags & (syn | ack) == syn"


def _frame_match_text(table: Table, statement: FrameMatch) -> str:
    match statement:
        case MatchFamily():
            return f"meta protocol {_ip(table)}"
        case MatchPriority(priority):
            return f"meta priority {priority >> 16:x}:{priority & 0xFFFF:x}"
        case MatchFragment(place):
            at = "ip frag-off" if table.family == 4 else "ip6 nexthdr ipv6-frag @nh,336,16"
            offset, more = (0x1FFF, 0x2000) if table.family == 4 else (0xFFF8, 0x1)
            if place == "later":
                return f"{at} & {offset:#x} != 0x0"
            return f"{at} & {offset | more:#x} == {more:#x}"


def _frame_change_text(table: Table, statement: FrameChange) -> str:
    match statement:
        case UpdateMap(fields, name, data, seconds):
            key = f"{_fields_text(table, fields)} timeout {seconds}s"
            return f"update @{name} {{ {key} : {data} }}"
        case Readdress(fields, name):
            return f"ether daddr set {_fields_text(table, fields)} map @{name}"
        case TakeFrame():
            return "meta pkttype set host"


def _change_text(table: Table, statement: Change) -> str:
    match statement:
        case SetMark(bits):
            return f"meta mark set mark or {bits:#x}"
        case ToggleMark(bits):
            return f"meta mark set mark xor {bits:#x}"
        case Dnat(address):
            return f"dnat to {address}"
        case DnatPick(fields, pick, name):
            key = f"{_fields_text(table, fields)} . {_pick_text(table, pick)}"
            return f"dnat {_ip(table)} to {key} map @{name}"
        case UpdateSet(name, field):
            return f"update @{name} {{ {_field_text(table, field)} }}"


def _ending_text(table: Table, statement: Ending) -> str:
    match statement:
        case Verdict():
            return _verdict_text(statement)
        case VerdictMap(fields, name):
            return f"{_fields_text(table, fields)} vmap @{name}"
        case PickVerdict(pick, verdicts):
            choices = ", ".join(f"{i} : {_verdict_text(v)}" for i, v in enumerate(verdicts))
            return f"{_pick_text(table, pick)} vmap {{ {choices} }}"
        case Reject(reset):
            return "reject with tcp reset" if reset else "reject"
        case Masquerade():
            return "masquerade fully-random"
        case Tproxy(address):
            return f"tproxy to {address}"
        case Counter():
            return "counter"


def _verdict_text(verdict: Verdict) -> str:
    return f"{verdict.kind} {verdict.chain}".rstrip()


def _pick_text(table: Table, pick: Pick) -> str:
    match pick.kind:
        case "random":
            return f"numgen random mod {pick.count}"
        case "turn":
            return f"numgen inc mod {pick.count}"
        case "source":
            return f"jhash {_ip(table)} saddr mod {pick.count} seed {pick.seed:#x}"


def _fields_text(table: Table, fields: tuple[Field, ...]) -> str:
    return " . ".join(_field_text(table, field) for field in fields)


def _field_text(table: Table, field: Field) -> str:
    match field:
        case "saddr" | "daddr":
            return f"{_ip(table)} {field}"
        case "l4proto":
            return "meta l4proto"
        case "sport" | "dport":
            return f"th {field}"
        case "id":
            return "ip id" if table.family == 4 else "frag id"


def _ip(table: Table) -> str:
    return "ip" if table.family == 4 else "ip6"


# --- Blocks ---------------------------------------------------------------------------------------


def _chain_lines(table: Table, chain: Chain, rules: Iterable[Rule]) -> Iterator[str]:
    yield f"\tchain {chain.name} {{"
    if chain.hook:
        where = f"type {chain.hook.type} hook {chain.hook.hook} priority {chain.hook.priority}"
        yield f"\t\t{where}; policy accept;"
    for rule in rules:
        yield f"\t\t{rule_text(table, rule)}"
    yield "\t}"


def _set_lines(table: Table, a_set: Set, elements: Sequence[Element]) -> Iterator[str]:
    yield f"\t{'set' if a_set.data is None else 'map'} {a_set.name} {{"
    yield f"\t\t{_type_text(table, a_set)}"
    if a_set.size is not None:
        yield f"\t\tsize {a_set.size}"
    if a_set.flags:
        yield f"\t\tflags {','.join(a_set.flags)}"
    if a_set.timeout_seconds is not None:
        yield f"\t\ttimeout {a_set.timeout_seconds}s"
    if a_set.counted:
        yield "\t\tcounter"
    if elements:
        ordered = sorted(elements, key=lambda element: key_order(a_set.key, element.key))
        lines = ",\n\t\t\t".join(element_text(a_set, element) for element in ordered)
        yield f"\t\telements = {{\n\t\t\t{lines}\n\t\t}}"
    yield "\t}"


def _type_text(table: Table, a_set: Set) -> str:
    if "slot" in a_set.key:
        key, data = _expressions_text(table, a_set.key), _data_text(table, a_set, typed=False)
        return f"typeof {key}{data}"
    return f"type {' . '.join(a_set.key)}{_data_text(table, a_set, typed=True)}"


def _data_text(table: Table, a_set: Set, *, typed: bool) -> str:
    if a_set.data is None:
        return ""
    if a_set.data == "verdict":
        return " : verdict"
    return f" : {' . '.join(a_set.data) if typed else _expressions_text(table, a_set.data)}"


def _expressions_text(table: Table, types: Types) -> str:
    """Return fields of a packet that have these types: nft learns the types from them."""
    return " . ".join(_example_text(table, kind) for kind in types)


def _example_text(table: Table, kind: TypeName) -> str:
    match kind:
        case "ipv4_addr" | "ipv6_addr":
            return _field_text(table, "daddr")
        case "inet_proto":
            return _field_text(table, "l4proto")
        case "inet_service":
            return _field_text(table, "dport")
        case "slot":
            return "meta cpu"
        case "ether_addr":
            return "ether daddr"
        case "mark":
            return "meta mark"


def element_text(a_set: Set, element: Element) -> str:
    words = key_text(a_set.key, element.key, element.key_end)
    if element.counted:
        words += " counter"
    if element.comment:
        words += f' comment "{clipped(element.comment)}"'
    if isinstance(element.data, Verdict):
        return f"{words} : {_verdict_text(element.data)}"
    if element.data is not None and isinstance(a_set.data, tuple):
        return f"{words} : {key_text(a_set.data, element.data)}"
    return words

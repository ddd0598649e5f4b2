"""``pyproxy explain``: what becomes of connections to a Service, what decided, and is it so."""

from collections.abc import Iterator, Sequence
from textwrap import wrap

from pyproxy.commands import CommandError
from pyproxy.commands._ask import Source, as_json, parsed, parser, service_named, show
from pyproxy.commands._table import WIDTH, shortened, table
from pyproxy.explain import Case, Explanation, FrontendCases, Share
from pyproxy.view import Answer
from pyproxy.written import Verification, VerifiedFamily

MARGIN = "  "
ORIGINS = {"pod": "pods", "node": "the node", "outside": "outside"}
WORDS = {
    "reject": "reject: refused at once",
    "drop": "drop: no answer",
    "pass": "pass: not touched, the load balancer gets it",
}
ENDPOINTS_SHOWN = 12
DIFFERENCES_SHOWN = 6


def main(words: Sequence[str]) -> int:
    made = parser("explain", "Say what becomes of connections to a Service, or of one, and why.")
    made.add_argument("object", nargs="?", default="", metavar="service/NAMESPACE/NAME")
    made.add_argument(
        "--from", dest="origin", metavar="WHO", help="pod/NAMESPACE/NAME, an IP, node or outside"
    )
    made.add_argument("--to", metavar="IP:PORT", help="where to; /udp or /sctp after it")
    own, source = parsed(made, words)
    explanation = source.ask("explain", Explanation, question(own.object, own.origin, own.to))
    verification = verified(source, explanation)
    answer = Explained(explanation, verification)
    show(as_json(answer) if own.output == "json" else text(explanation) + found(verification))
    return 0


class Explained(Answer, frozen=True):
    """What ``-o json`` prints. Without a daemon nothing is verified."""

    explanation: Explanation
    verification: Verification | None


def verified(source: Source, explanation: Explanation) -> Verification | None:
    """Have the daemon look at what is really there for the Service."""
    if not source.is_live or not explanation.frontends:
        return None
    return source.ask("verify", Verification, {"service": explanation.service})


def found(verification: Verification | None) -> str:
    if verification is None:
        return ""
    where = "our sockets" if verification.mode == "userspace" else "the kernel"
    lines = [line for family in verification.families for line in verdict(family, where)]
    return "".join(f"{line}\n" for line in ("", *lines)) if lines else ""


def verdict(family: VerifiedFamily, where: str) -> Iterator[str]:
    begin = f"verified, IPv{family.family}:"
    if family.verdict == "unknown":
        yield from paragraph(f"not {begin} {family.problem}", "")
    elif family.entries:
        differing = len(family.differences)
        if not differing:
            entries = f"{family.entries} entr{'y' if family.entries == 1 else 'ies'}"
            yield f"{begin} agreed with {where}, {entries}"
            return
        yield f"{begin} NOT AS WRITTEN in {where}, {differing} of {family.entries} entries"
        for difference in family.differences[:DIFFERENCES_SHOWN]:
            yield shortened(f"{MARGIN}{difference.entry}", WIDTH)
            yield shortened(f"{MARGIN * 2}should be  {difference.wanted}", WIDTH)
            yield shortened(f"{MARGIN * 2}is         {difference.held or 'not there'}", WIDTH)


def question(named: str, origin: str | None, to: str | None) -> dict[str, str]:
    """Return the query. Raises ``CommandError`` for words that do not make one."""
    if to:
        if named:
            raise CommandError("explain: either service/NAMESPACE/NAME, or --from and --to")
        return {"from": origin or "outside", "to": to}
    if origin or not named:
        raise CommandError("explain: it needs service/NAMESPACE/NAME, or --from WHO --to IP:PORT")
    return {"service": service_named(named)}


def text(answer: Explanation) -> str:
    lines = [f"{answer.about}, as {answer.node} (mode {answer.mode}) sees it"]
    if answer.service:
        lines += headed(answer)
    if answer.not_ours:
        lines.append("")
    for item in answer.not_ours:
        lines += paragraph(f"not ours: {item.reason}", "")
    alike: dict[tuple[object, ...], list[FrontendCases]] = {}
    for frontend in answer.frontends:
        key = (frontend.cases, frontend.state, frontend.allowed_sources, frontend.problems)
        alike.setdefault(key, []).append(frontend)
    for frontends in alike.values():
        lines += ["", *of_frontends(frontends)]
    if shares := shares_of(answer):
        lines += ["", *endpoints_lines(shares)]
    for remark in answer.remarks:
        lines += ["", *paragraph(f"note: {remark}", "")]
    return "".join(f"{line}\n" for line in lines)


def headed(answer: Explanation) -> list[str]:
    facts = [f"Service {answer.service}"] if answer.service not in answer.about else []
    facts += [f"resourceVersion {answer.resource_version}"] if answer.resource_version else []
    facts += [f"selector {answer.selector}"] if answer.selector else ["no selector"]
    facts += [f"EndpointSlices {answer.slices}" if answer.slices else "no EndpointSlice"]
    return paragraph(", ".join(facts), MARGIN)


def of_frontends(found: Sequence[FrontendCases]) -> Iterator[str]:
    """Yield the lines of frontends that fare alike."""
    first = found[0]
    since = f" since {in_seconds(first.since)}" if first.since else ""
    port = f' port "{first.port}"' if first.port else ""
    where = ", ".join(f"{frontend.frontend} ({frontend.kind})" for frontend in found)
    yield from paragraph(f"{where}{port}, {first.state}{since}", "")
    for problem in first.problems:
        yield from paragraph(f"problem: {problem}", MARGIN)
    if first.allowed_sources is not None:
        ranges = ", ".join(first.allowed_sources)
        yield from paragraph(f"clients outside {ranges} are dropped", MARGIN)
    by_reason: dict[tuple[str, str, str], list[Case]] = {}
    for case in first.cases:
        by_reason.setdefault((case.reason, case.object, case.field), []).append(case)
    for (reason, what, field), cases in by_reason.items():
        for case in cases:
            yield from paragraph(f"{origins(case)}: {outcome(case)}", MARGIN)
        yield from paragraph(f"because {reason} [{what}: {field}]", MARGIN * 2)


def in_seconds(moment: str) -> str:
    """Return an RFC 3339 moment without the fraction of its second."""
    return moment.partition(".")[0].removesuffix("Z") + "Z"


def origins(case: Case) -> str:
    if len(case.origins) == len(ORIGINS):
        return "everybody"
    return "from " + ", ".join(ORIGINS[origin] for origin in case.origins)


def outcome(case: Case) -> str:
    if case.action != "forward":
        return WORDS[case.action]
    parts = [f"forward to {len(case.endpoints)} endpoint{'s' * (len(case.endpoints) != 1)}"]
    if case.affinity_seconds is not None:
        parts.append(f"a client keeps its own for {case.affinity_seconds} s")
    if case.scheduler:
        parts.append(f"scheduler {case.scheduler}")
    if case.masquerade:
        parts.append(f"masqueraded ({case.masquerade_reason})")
    elif case.masquerade_reason:
        parts.append(f"masqueraded {case.masquerade_reason}")
    else:
        parts.append("client address kept")
    return "; ".join(parts)


def shares_of(answer: Explanation) -> list[Share]:
    """Return the endpoints of the answer: those of the largest pool of each family."""
    best: dict[tuple[int, str], tuple[Share, ...]] = {}
    for frontend in answer.frontends:
        for case in frontend.cases:
            key = (frontend.family, frontend.port)
            if len(case.endpoints) > len(best.get(key, ())):
                best[key] = case.endpoints
    return [share for shares in best.values() for share in shares]


def endpoints_lines(shares: Sequence[Share]) -> list[str]:
    head = ("ENDPOINT", "SHARE", "POD", "NODE", "ZONE")
    rows = [
        (s.address, "varies" if s.probability is None else f"{s.probability:.1%}", s.pod, s.node,
         s.zone)
        for s in shares[:ENDPOINTS_SHOWN]
    ]  # fmt: skip
    lines = table(head, rows).splitlines()
    more = len(shares) - ENDPOINTS_SHOWN
    return lines + ([f"and {more} more (-o json has all)"] if more > 0 else [])


def paragraph(words: str, margin: str) -> list[str]:
    return wrap(
        words, WIDTH, initial_indent=margin, subsequent_indent=margin + MARGIN,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip

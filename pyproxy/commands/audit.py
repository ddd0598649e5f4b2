"""``pyproxy audit``: compare everything with the kernel now, and have it put right.

Exit code 0: all agrees; 1: something differed; 2: nobody can tell.
"""

from collections.abc import Sequence

from pyproxy.commands import CommandError
from pyproxy.commands._ask import as_json, parsed, parser, show, tell
from pyproxy.commands.diff import TROUBLE, family_text, verdict
from pyproxy.written import Verification


def main(words: Sequence[str]) -> int:
    made = parser(
        "audit",
        "Compare all that was written with the kernel, and put right what is not.",
        without_daemon="",
    )
    made.add_argument(
        "--repair", choices=("true", "false"), default="true", help="default: %(default)s"
    )
    own, source = parsed(made, words)
    try:
        if not source.is_live:
            raise CommandError("audit: only a running pyproxy has written anything; leave out -f")
        found = source.ask("audit", Verification, {"repair": own.repair})
    except CommandError as error:
        for line in error.args:
            tell(line)
        return TROUBLE
    text = "".join(map(family_text, found.families))
    if own.repair == "true" and any(family.differences for family in found.families):
        text += "being put right\n"
    show(as_json(found) if own.output == "json" else text)
    return verdict(found)

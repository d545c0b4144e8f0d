"""The verb can: what this client may."""

from __future__ import annotations

from argparse import Namespace

from gmemd.cli import render
from gmemd.cli.connection import DONE, REFUSED, Connection
from gmemd.cli.parser import Verbs, argument

VERBS = Verbs()


@VERBS.add(
    "say whether you may use a command; without one, what you may",
    argument("command", metavar="COMMAND", nargs="?", completes="commands"),
    argument("id", metavar="ID", nargs="?", completes="ids", help="on this object"),
    examples=("can object-del ram0", "can"))
def can(connection: Connection, options: Namespace) -> int:
    asked = {name: value for name, value in (("command", options.command), ("id", options.id)) if value is not None}
    rights = connection.execute("query-memdev-rights", asked)
    if not connection.for_people:
        connection.show(rights)
    elif options.command is None:
        render.show(render.Table(("YOU ARE", "UID", "COMMANDS", "TYPES", "FILES BELOW"), [(
            rights["role"] if rights["policy"] else f"{rights['role']} (there is no policy)", str(rights["uid"]),
            str(len(rights["commands"])), str(len(rights["types"])), " ".join(rights.get("paths", ["/"])) or "nowhere",
        )]))
    else:
        print("yes" if rights["allowed"] else f"no: {rights['reason']}")
    return DONE if rights.get("allowed", True) else REFUSED

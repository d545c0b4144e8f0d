"""The verb that makes the objects of a file exist: apply."""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.chosen import is_sure
from gmemd.cli.connection import DONE, REFUSED, Connection, note, short_type
from gmemd.cli.parser import DRY_RUN, YES, Verbs, argument
from gmemd.cli.verbs.quota import shown

VERBS = Verbs()
_PLACE = re.compile(r"^actions\[\d+\] \([a-z-]+\): ")


@VERBS.add(
    "let the objects of a file exist: print what that changes, then change all of it or nothing",
    argument("file", metavar="FILE", help="YAML or JSON: version: 1, objects: [...], clones: [...]; - for stdin"),
    argument("--prune", action="store_true", help="also delete your user's memory that the file does not name"),
    YES, DRY_RUN,
    examples=("apply guests.yaml --dry-run", "apply guests.yaml", "apply guests.yaml --prune --yes"))
def apply(connection: Connection, options: Namespace) -> int:
    from gmemd.cli.plan import plan
    from gmemd.cli.wanted import read

    steps = plan(connection, read(options.file), prune=options.prune)
    actions = [step.action for step in steps if not step.refused]
    planned = connection.execute("memdev-transaction", {"actions": actions, "dry-run": True}) if actions else {}
    judged = iter(planned.pop("actions", ()))
    for index, step in enumerate(steps):
        if not step.refused and "refused" in (found := next(judged)):
            desc = _PLACE.sub("", found["refused"]["desc"])
            steps[index] = step._replace(refused=desc if f"'{step.id}'" in desc else f"object '{step.id}': {desc}")
    refusals = [step.refused for step in steps if step.refused]
    _print_plan(connection, steps, planned if connection.dry_run else {})
    for sentence in refusals:
        note(sentence)
    if refusals or connection.dry_run or not actions:
        return REFUSED if refusals else DONE
    deleted = [step.id for step in steps if step.sign == "-"]
    if deleted and not options.yes and not is_sure("remove {}", deleted):
        note("nothing was changed")
        return REFUSED
    connection.execute("memdev-transaction", {"actions": actions})
    return DONE


def _print_plan(connection: Connection, steps: list[Any], planned: dict[str, Any]) -> None:
    """The steps, and of a dry run what they would do to the machine's memory."""
    told = [step.told() for step in steps]
    if connection.output == "name":
        connection.show(told)
    elif not connection.for_people:
        connection.show({"changes": told, **planned})
    elif not steps:
        print("nothing to do")
    else:
        render.show(render.Table(("", "ID", "TYPE", "WHAT"), [
            (step.sign, step.id, short_type(step.qom_type), ("refused: " if step.refused else "") + step.what)
            for step in steps]))
        if planned:
            print()
            render.show(render.Table((), list(_memory(planned))))


def _memory(planned: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about bytes by size of page and by node, and about what is limited."""
    rows = [("memory", _more(planned["bytes"]))]
    rows += [(f"pages of {render.size(row['page-size'])}", f"{_more(row['bytes'])}, {render.size(row['free'])} free")
             for row in planned["pages"]]
    rows += [(f"node {row['node']}" if "node" in row else "node of the kernel's choice", _more(row["bytes"]))
             for row in planned["nodes"]]
    return rows + [(f"quota of {row['what']}", f"{shown(row['what'], row['used'])} used of "
                    f"{shown(row['what'], row['limit'])}") for row in planned.get("quota", ()) if "limit" in row]


def _more(number: int) -> str:
    return f"{render.size(abs(number))} {'less' if number < 0 else 'more'}"

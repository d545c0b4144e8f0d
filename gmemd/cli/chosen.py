"""Which objects a command line selects: ids, patterns with * ? [ ], or --all.

No id contains these characters, so a word is either an id or a pattern.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, REFUSED, Connection, note
from gmemd.cli.hints import few
from gmemd.errors import QmpError


def is_pattern(word: str) -> bool:
    return not set("*?[]").isdisjoint(word)


def are_several(options: Namespace) -> bool:
    """Whether more than one object may be selected: programs then get a list, even of one."""
    return len(options.id) != 1 or is_pattern(options.id[0])


def gather(connection: Connection, options: Namespace, ask: Callable[[str], Any], *, changes: str = "",
           among: Callable[[], Iterable[str]] | None = None) -> tuple[int, dict[str, Any]]:
    """Ask about each selected object; return the exit status, and the answers by id, without those that are None.

    A refusal is explained, and does not stop the others.
    `changes`: what is done to them, such as "remove {}"; it needs a yes unless the objects were named one by one.
    `among`: gives the ids that a pattern may match; by default all memory backends.
    """
    ids, unmatched = choose(connection, options, among or connection.memory)
    for error in unmatched:
        connection.explain(error)
    by_name = not (options.all or any(map(is_pattern, options.id)))
    if changes and ids and not (by_name or connection.dry_run or options.yes or is_sure(changes, ids)):
        note("nothing was changed")
        return REFUSED, {}
    status = REFUSED if unmatched else DONE
    found: dict[str, Any] = {}
    for name in ids:
        try:
            found[name] = ask(name)
        except QmpError as error:
            connection.explain(error)
            status = REFUSED
    return status, {name: value for name, value in found.items() if value is not None}


def report(connection: Connection, options: Namespace, ask: Callable[[str], Any], tell: Callable[[str, Any], None],
           *, between: str = "\n", **settings: Any) -> int:
    """Query each selected object, and print the answers one after the other; for people through `tell`."""
    status, found = gather(connection, options, ask, **settings)
    if not connection.for_people:
        show_all(connection, options, found)
        return status
    for number, (name, value) in enumerate(found.items()):
        print(between if number else "", end="")
        tell(name, value)
    return status


def report_table(connection: Connection, options: Namespace, ask: Callable[[str], Any], header: tuple[str, ...],
                 rows: Callable[[Any], Iterable[tuple[str, ...]]], numbers: tuple[str, ...]) -> int:
    """The same in one table for people: an answer becomes rows, with the id if there are several objects."""
    status, found = gather(connection, options, ask)
    if connection.for_people:
        several = are_several(options)
        lines = [(*[name] * several, *row) for name, value in found.items() for row in rows(value)]
        if found or options.all:
            render.show(render.Table((*["ID"] * several, *header), lines, numbers))
    else:
        show_all(connection, options, found)
    return status


def show_all(connection: Connection, options: Namespace, found: dict[str, Any], command: str = "") -> None:
    """Print an answer as it is; answers for several objects as one list, with the id in each."""
    if are_several(options) or connection.output == "name":
        connection.show([{"id": name, **part} for name, value in found.items()
                         for part in (value if isinstance(value, list) else [value])], command)
    else:
        for value in found.values():
            connection.show(value, command)


def statuses(connection: Connection, options: Namespace, *, survival: bool = True
             ) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the exit status, the status of each selected object (by default all), and the lost ones among them.

    `survival`: what they survive is wanted; it is most of the answer.
    """
    if not options.id:
        found, lost = connection.statuses(survival=survival), connection.lost_objects()
        return DONE, sorted(found, key=lambda one: str(one["id"])), lost
    lost = [one for one in connection.lost_objects() if one["id"] not in options.id]  # refused by its name
    gone = [one["id"] for one in lost]
    status, answers = gather(connection, options, lambda name: [] if name in gone else
                             connection.execute("query-memdev-status", {"id": name}))
    return status, [one for answer in answers.values() for one in answer], [one for one in lost if one["id"] in answers]


def choose(connection: Connection, options: Namespace, among: Callable[[], Iterable[str]]
           ) -> tuple[list[str], list[QmpError]]:
    """Return the selected ids, once each, and messages for patterns that match nothing."""
    if bool(options.id) == options.all:
        raise UsageError(f"{options.verb}: " + ("ids or --all, not both" if options.all else
                                                "which objects? ids, a quoted pattern such as 'vm*', or --all"))
    here = list(among()) if options.all or any(map(is_pattern, options.id)) else []
    if options.all and not here:
        note("there are no objects")
    found = here if options.all else []
    unmatched = []
    for word in options.id:
        pattern = word.replace("[^", "[!")  # as in the shell
        matching = [name for name in here if fnmatchcase(name, pattern)] if is_pattern(word) else [word]
        if not matching:
            unmatched.append(QmpError(f"no object matches '{word}'"))
        found += matching
    return list(dict.fromkeys(found)), unmatched


def is_sure(changes: str, ids: list[str], noun: str = "object") -> bool:
    """Ask on the terminal; UsageError if there is none."""
    what = changes.format(f"{len(ids)} {noun}{'s' if len(ids) > 1 else ''}") + f": {few(ids)}"
    if not sys.stdin.isatty():
        raise UsageError(f"this would {what}; add --yes if that is right")
    print(f"{what[0].upper()}{what[1:]}? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")

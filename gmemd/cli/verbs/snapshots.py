"""The verbs about snapshots: save, ls, show, verify, restore, rm, flatten, prune, import."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from gmemd.cli import render
from gmemd.cli.chosen import is_sure
from gmemd.cli.connection import DONE, REFUSED, Connection, note
from gmemd.cli.hints import Refusal, listed, nearest
from gmemd.cli.parser import DRY_RUN, FENCE, YES, Verbs, argument, fence
from gmemd.cli.verbs.jobs import run_job
from gmemd.errors import QmpError

VERBS = Verbs()
_GROUP = "snapshot"
_HERE = "gmemctl-directory"  # the name of a passed directory
_FILE = "gmemctl-file"
_COLUMNS = ("NAME", "OBJECT", "SIZE", "ON DISK", "STORED", "CONSISTENT", "CREATED", "")
_WIDE = ("VIA", "PAUSE", "GENERATION", "PARENT", "UUID")

_DIR = argument("--dir", metavar="PATH", help="in this directory instead of the daemon's own")
_NAME = argument("name", metavar="NAME", completes="snapshots")
_NAMES = argument("name", metavar="NAME", nargs="+", completes="snapshots")


def _here(refusal: Refusal, name: str) -> Iterable[str]:
    names = [one["name"] for one in refusal.ask("query-memdev-snapshots")]
    yield nearest(name, names)
    yield listed("the snapshots here", names) or "there are no snapshots; 'gmemctl snapshot save ID' makes one"


def _number(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) >= 0:
            return number
    raise ArgumentTypeError(f"'{text}' is not a number of snapshots")


# -- making and using ----------------------------------------------------------------------------------

@VERBS.add(
    "save an object's memory, with digests, so that it appears whole or not at all",
    argument("id", metavar="ID", completes="ids"),
    argument("name", metavar="NEW-NAME", nargs="?", help="default: the object's id and the time"),
    *FENCE,
    argument("--live", action="store_true", help="copy most of it while the guest still runs"),
    argument("--parent", metavar="NAME", completes="snapshots", help="write only what differs from that one"),
    argument("--cold", action="store_true", help="compress it afterwards"), _DIR, DRY_RUN,
    group=_GROUP, examples=("snapshot save ram0 before-upgrade", "snapshot save ram0 --dry-run"),
    hints=((r"^snapshot '(.*)' exists already$",
            "choose another name, or remove that one: gmemctl snapshot rm {}"),
           (r"^object '(.*)' is held by process", "'gmemctl who {}' lists the holders; --qmp PATH stops a guest")))
def save(connection: Connection, options: Namespace) -> int:
    given = {"id": options.id, "name": options.name, "parent": options.parent, "fence": fence(options),
             "live": options.live, "cold": options.cold}
    return _work(connection, "memdev-snapshot", {name: value for name, value in given.items() if value is not None},
                 options)


@VERBS.add("make an object of a snapshot, every byte compared with its digest", _NAME,
           argument("--id", metavar="NEW-ID", help="the id of the object; default: that of the one that was saved"),
           argument("--force", action="store_true", help="in place of an object that no process holds"),
           argument("--allow-inconsistent", action="store_true", help="even if writers were not kept away"),
           _DIR, DRY_RUN, group=_GROUP, examples=("snapshot restore clean --id ram9",))
def restore(connection: Connection, options: Namespace) -> int:
    given = {"name": options.name, "force": options.force, "allow-inconsistent": options.allow_inconsistent}
    return _work(connection, "memdev-restore", given if options.id is None else {**given, "id": options.id}, options)


@VERBS.add("compare snapshots with their digests", _NAMES, _DIR, group=_GROUP, examples=("snapshot verify clean",))
def verify(connection: Connection, options: Namespace) -> int:
    def each(name: str) -> dict[str, Any]:
        run_job(connection, "memdev-snapshot-verify", {"name": name, **_place(connection, options)})
        return {"name": name, "intact": True}

    return _each(connection, options.name, each, lambda found: f"{found['name']}: intact")


@VERBS.add("rewrite snapshots so that they need no other", _NAMES,
           argument("--cold", action="store_true", help="and compress them"), _DIR, DRY_RUN,
           group=_GROUP, examples=("snapshot flatten clean --cold",))
def flatten(connection: Connection, options: Namespace) -> int:
    def each(name: str) -> Any:
        return _run(connection, "memdev-snapshot-flatten", {"name": name, "cold": options.cold}, options)

    return _each(connection, options.name, each)


@VERBS.add("make a snapshot of a file that QEMU's migration has written with mapped-ram",
           argument("file", metavar="FILE"), argument("name", metavar="NEW-NAME"),
           argument("--block", metavar="BLOCK", help="which RAM block; default: the only one, or the largest"),
           argument("--id", metavar="NEW-ID", help="the object's id; default: the last part of the block's name"),
           _DIR, DRY_RUN, group=_GROUP, examples=("snapshot import vm1.mapped-ram vm1-before",))
def import_(connection: Connection, options: Namespace) -> int:
    given = {"name": options.name, "file": _FILE, "block": options.block, "id": options.id}
    fd = os.open(options.file, os.O_RDONLY)
    try:
        connection.execute("getfd", {"fdname": _FILE}, [fd])
    finally:
        os.close(fd)
    return _work(connection, "memdev-snapshot-import",
                 {name: value for name, value in given.items() if value is not None}, options)


# -- listing and removing ------------------------------------------------------------------------------

@VERBS.add("list the snapshots", argument("--object", metavar="ID", completes="ids", help="only those of this object"),
           _DIR, group=_GROUP, examples=("snapshot ls", "snapshot ls --object ram0 -o json"))
def ls(connection: Connection, options: Namespace) -> int:
    found = _found(connection, options)
    if not connection.for_people:
        connection.show(found)
        return DONE
    header = (*_COLUMNS, *_WIDE) if connection.output == "wide" else _COLUMNS
    render.show(render.Table(header, [_row(one, wide=connection.output == "wide") for one in found],
                             ("SIZE", "ON DISK", "PAUSE", "GENERATION")))
    return DONE


def _row(one: dict[str, Any], *, wide: bool) -> tuple[str, ...]:
    """The cells of a snapshot; one that cannot be used has few."""
    saved = one.get("object", {})
    mark = one.get("problem") or ("checkpoint" if "device-state" in one else "")
    consistent = {True: "yes", False: "NO", None: "-"}[one.get("consistent")]
    cells = (one["name"], saved.get("id", "-"), render.size(saved["size"]) if saved else "-",
             render.size(one["bytes"]), one.get("stored", "BAD"), consistent, one.get("created", "-"), mark)
    more = (one.get("via", "-"), f"{one['pause-ms']} ms" if "pause-ms" in one else "-",
            str(one.get("generation", "-")), one.get("parent", "-"), one.get("uuid", "-"))
    return (*cells, *more) if wide else cells


@VERBS.add("show a snapshot", _NAME, _DIR, group=_GROUP, examples=("snapshot show clean",),
           hints=((r"^snapshot '(.*)' not found$", _here),))
def show(connection: Connection, options: Namespace) -> int:
    [found] = connection.execute("query-memdev-snapshots", {"name": options.name, **_place(connection, options)})
    connection.show(found, "query-memdev-snapshots")
    return DONE


@VERBS.add("remove snapshots", _NAMES, _DIR, DRY_RUN, group=_GROUP, examples=("snapshot rm clean --dry-run",),
           hints=((r"^snapshot '.*' is the parent of '(.*)'",
                   "'gmemctl snapshot flatten {}' makes that one independent"),))
def rm(connection: Connection, options: Namespace) -> int:
    def each(name: str) -> Any:
        return connection.change("memdev-snapshot-delete", {"name": name, **_place(connection, options)})

    return _each(connection, options.name, each)


@VERBS.add("remove all but the newest snapshots of each object",
           argument("--keep", metavar="K", type=_number, required=True, help="how many of each object stay"),
           argument("--object", metavar="ID", completes="ids", help="only of this object"), YES, _DIR, DRY_RUN,
           group=_GROUP, examples=("snapshot prune --keep 3 --dry-run",))
def prune(connection: Connection, options: Namespace) -> int:
    old, needed = to_prune(_found(connection, options), options.keep)
    for name, child in needed.items():
        note(f"'{name}' stays: '{child}' needs it")
    if not old:
        note("nothing to remove")
        return DONE
    if not (connection.dry_run or options.yes or is_sure("remove {}", old, "snapshot")):
        note("nothing was changed")
        return REFUSED

    def each(name: str) -> Any:
        return connection.change("memdev-snapshot-delete", {"name": name, **_place(connection, options)})

    return _each(connection, old, each)


def to_prune(found: list[dict[str, Any]], keep: int) -> tuple[list[str], dict[str, str]]:
    """Which of the snapshots, given the oldest first, are removed so that `keep` of each object stay, in that order.

    Also those that stay nevertheless, with one that stays and needs it. What cannot be used is not counted, and stays.
    """
    by_object: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        if "problem" not in one:
            by_object.setdefault(one["object"]["id"], []).append(one)
    old = [one for those in by_object.values() for one in those[:len(those) - keep]]
    gone = {one["name"] for one in old}
    needed = {one["name"]: child for one in old for child in one.get("children", ()) if child not in gone}
    # a delta before what it needs
    old.sort(key=lambda one: bool(one.get("children")))
    return [one["name"] for one in old if one["name"] not in needed], needed


# -- for all of them -----------------------------------------------------------------------------------

def _found(connection: Connection, options: Namespace) -> list[dict[str, Any]]:
    wanted = {} if options.object is None else {"object": options.object}
    found: list[dict[str, Any]] = connection.execute("query-memdev-snapshots", {**wanted,
                                                                               **_place(connection, options)})
    return found


def _place(connection: Connection, options: Namespace) -> dict[str, str]:
    """The argument that names the directory, once it is passed; {}: the daemon's own."""
    if options.dir is None:
        return {}
    fd = os.open(options.dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        connection.execute("getfd", {"fdname": _HERE}, [fd])
    finally:
        os.close(fd)
    return {"fdname": _HERE}


def _work(connection: Connection, command: str, arguments: dict[str, Any], options: Namespace) -> int:
    """Run a command as a job, or say what it would do; print what it returns."""
    found = _run(connection, command, arguments, options)
    if found:
        connection.show(found)
    return DONE


def _run(connection: Connection, command: str, arguments: dict[str, Any], options: Namespace) -> Any:
    arguments = {**arguments, **_place(connection, options)}
    if connection.dry_run:
        return connection.change(command, arguments)
    return run_job(connection, command, arguments)


def _each(connection: Connection, names: list[str], work: Any, tell: Any = None) -> int:
    """Work on each of several snapshots; a refusal is explained, and does not stop the others."""
    status, found = DONE, []
    for name in dict.fromkeys(names):
        try:
            value = work(name)
        except QmpError as error:
            connection.explain(error)
            status = REFUSED
            continue
        if value:
            found.append(value)
            if connection.for_people and tell is not None:
                print(tell(value))
    if not connection.for_people and found:
        connection.show(found if len(names) > 1 else found[0])
    return status

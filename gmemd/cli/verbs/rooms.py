"""The verbs about made rooms: add, ls, rm."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError, Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.connection import DONE, Connection
from gmemd.cli.parser import DRY_RUN, Verbs, argument
from gmemd.schema.sizes import parse_size

VERBS = Verbs()
_GROUP = "room"
_COLUMNS = ("ROOM", "NAMESPACE", "OBJECTS", "SIZE", "LIMIT", "CLIENTS", "SOCKET", "")


def _bytes(text: str) -> int:
    if (number := parse_size(text.removesuffix("iB"))) is None:
        raise ArgumentTypeError(f"'{text}' is not a size such as 64G")
    return number


@VERBS.add(
    "make a room: a place for objects, which are called ID@ROOM, with a socket at which there is nothing else",
    argument("id", metavar="NEW-ROOM"),
    argument("--at", metavar="PATH", type=os.path.abspath,
             help="its socket; whoever may open the directory may use what is in the room"),
    argument("--namespace", metavar="NAME", help="whose it is, for the policy"),
    argument("--note", metavar="TEXT", help="words of your own"),
    argument("--bytes", metavar="SIZE", type=_bytes, help="how much memory it may have"),
    argument("--objects", metavar="N", type=int, help="how many objects it may have"), DRY_RUN,
    group=_GROUP, examples=("room add room1 --bytes 64G --objects 4",),
    hints=((r"^room '(.*)' exists already$", "'gmemctl room ls' lists the rooms"),))
def add(connection: Connection, options: Namespace) -> int:
    given = {"id": options.id, "socket": options.at, "namespace": options.namespace, "note": options.note,
             "limits": {what: limit for what, limit in (("bytes", options.bytes), ("objects", options.objects))
                        if limit is not None}}
    connection.change("memdev-room-add", {name: value for name, value in given.items() if value not in (None, {})})
    return DONE


@VERBS.add("list the rooms", group=_GROUP, examples=("room ls", "room ls -o json"))
def ls(connection: Connection, options: Namespace) -> int:
    found = connection.execute("query-memdev-rooms")
    if connection.for_people:
        render.show(render.Table(_COLUMNS, [_row(one) for one in found], ("OBJECTS", "SIZE", "LIMIT", "CLIENTS")))
    else:
        connection.show(found)
    return DONE


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    limit = one.get("limits", {}).get("bytes")
    return (one["id"], one.get("namespace", "-"), str(one["objects"]), render.size(one["bytes"]),
            "-" if limit is None else render.size(limit), str(one["clients"]), one.get("socket", "-"),
            one.get("trouble", ""))


@VERBS.add("remove a room without objects", argument("id", metavar="ROOM", completes="rooms"), DRY_RUN, group=_GROUP,
           examples=("room rm room1 --dry-run", "room rm room1"),
           hints=((r"^room '(.*)' has the object '(.*)'", "gmemctl rm {1}@{0}"),))
def rm(connection: Connection, options: Namespace) -> int:
    connection.change("memdev-room-del", {"id": options.id})
    return DONE

"""The daily verbs: ls, show, create, rm, get-fd."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from gmemd.cli import render
from gmemd.cli.chosen import are_several, gather, report, show_all, statuses
from gmemd.cli.connection import DONE, Connection, note, note_lost, short_type
from gmemd.cli.hints import few
from gmemd.cli.parser import DRY_RUN, IDS, YES, Verbs, argument
from gmemd.cli.verbs.server import print_arguments
from gmemd.errors import QmpError

VERBS = Verbs()
_SORT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "id": lambda status: status["id"],
    "size": lambda status: status["size"],
    "age": lambda status: status.get("age", -1),
    "resident": lambda status: status.get("resident", -1),
    "owner": lambda status: _owner(status),
}
_COLUMNS = ("ID", "TYPE", "KIND", "KERNEL", "SIZE", "RESIDENT", "OWNER", "AGE", "OUT")
_WIDE = ("OFFSET", "SHARE", "PREALLOC", "POLICY", "NODES", "SURVIVES")
_NUMBERS = ("SIZE", "RESIDENT", "OUT", "OFFSET")


@VERBS.add(
    "list the objects", *IDS,
    argument("--owner", metavar="UID|NAME", completes="owners", help="only objects of this user"),
    argument("--type", metavar="TYPE", completes="types", help="only this type: memfd, memory-backend-memfd"),
    argument("--sort", choices=tuple(_SORT), default="id", help="ascending; default: by id"),
    argument("-r", "--reverse", action="store_true", help="in reverse order"),
    examples=("ls", "ls 'vm0*' --sort resident -r", "ls --owner root --type memfd -o wide", "ls -o name"))
def ls(connection: Connection, options: Namespace) -> int:
    if (connection.output, options.sort, options.id, options.owner, options.type) == ("name", "id", [], None, None):
        names = [name for is_memory, name in connection.objects() if is_memory]  # they need not be measured for that
        connection.show([{"id": name} for name in (reversed(names) if options.reverse else names)])
        note_lost(connection.lost_objects())
        return DONE
    status, found, lost = statuses(connection, options, survival=connection.output != "table")
    meant = [one for one in [*found, *lost] if _is_meant(one, options)]
    meant.sort(key=lambda one: (_SORT[options.sort](one), one["id"]), reverse=options.reverse)
    if not connection.for_people:
        connection.show([{"id": one["id"], **one} for one in meant if "kind" in one])
    elif meant or not options.id:
        _print_objects(connection, meant)
    if not meant and (here := [*found, *lost]):
        types = sorted({short_type(one["qom-type"]) for one in here})
        owners = sorted({_owner(one).partition("/")[0] for one in here})
        note(f"no object matches; types here: {few(types)}; owners: {few(owners)}")
    note_lost([one for one in meant if "kind" not in one])
    return status


def _is_meant(status: dict[str, Any], options: Namespace) -> bool:
    if options.type is not None and options.type not in (status["qom-type"], short_type(status["qom-type"])):
        return False
    uid = status.get("owner", {}).get("uid")
    return options.owner is None or (uid is not None and options.owner in (str(uid), render.user(uid)))


def _print_objects(connection: Connection, statuses: list[dict[str, Any]]) -> None:
    if connection.output == "wide":
        memdevs = {memdev["id"]: memdev for memdev in connection.execute("query-memdev")}
        rows = [(*_row(status), *_more(status, memdevs.get(status["id"], {}))) for status in statuses]
        render.show(render.Table((*_COLUMNS, *_WIDE), rows, _NUMBERS))
    else:
        render.show(render.Table(_COLUMNS, list(map(_row, statuses)), _NUMBERS))


def _row(status: dict[str, Any]) -> tuple[str, ...]:
    """The cells of an object; a lost one has few."""
    return (
        status["id"],
        short_type(status["qom-type"]),
        status.get("kind", "lost"),
        status.get("kernel", "-"),
        render.size(status["size"]),
        render.size(status.get("resident")) if "kind" in status else "-",
        _owner(status),
        render.duration(status["age"]) if "age" in status else "-",
        str(status.get("handed-out", "-")),
    )


def _more(status: dict[str, Any], memdev: dict[str, Any]) -> tuple[str, ...]:
    words = {True: "on", False: "off", None: "-"}
    return (
        render.size(status.get("offset", 0)),
        words[memdev.get("share")],
        words[memdev.get("prealloc")],
        memdev.get("policy", "-"),
        ",".join(map(str, memdev.get("host-nodes", ()))) or "-",
        ",".join(_survived(status)) or "-",
    )


def _survived(status: dict[str, Any]) -> list[str]:
    return [fate["event"] for fate in status.get("survival", ()) if fate["survives"]]


def _owner(status: dict[str, Any]) -> str:
    owner = status.get("owner")
    return f"{render.user(owner['uid'])}/{owner['pid']}" if owner else "-"


@VERBS.add("show objects: what they are, their state, their properties", *IDS,
           examples=("show ram0", "show 'vm0*' -o yaml"))
def show(connection: Connection, options: Namespace) -> int:
    def ask(name: str) -> dict[str, Any]:
        [status] = connection.execute("query-memdev-status", {"id": name})
        [listed] = connection.execute("qom-list-get", {"paths": [f"/objects/{name}"]})
        return {"status": status, "properties": {
            entry["name"]: entry["value"]
            for entry in listed["properties"]
            if "value" in entry and entry["name"] != "type" and not entry["type"].startswith("child<")
        }}

    return report(connection, options, ask, lambda name, found: _print_object(connection, **found))


def _print_object(connection: Connection, status: dict[str, Any], properties: dict[str, Any]) -> None:
    people = {"resident": "unknown", **status, "owner": _owner(status),
              **({"runner": _owner({"owner": status["runner"]})} if "runner" in status else {}),
              "age": render.duration(status["age"]),
              "survival": ", ".join(_survived(status))}
    names = render.ordered(people, connection.introspection.result_members("query-memdev-status"))
    _print_fields({name: people[name] for name in names})
    print()
    _print_fields(properties)


def _print_fields(value: dict[str, Any]) -> None:
    render.show(render.Table((), [(name, render.exact_size(part) if name in render.BYTES and type(part) is int else
                                   render.cell(name, part)) for name, part in value.items()]))


@VERBS.add(
    "create objects",
    argument("spec", metavar="SPEC", nargs="+", help="TYPE,id=ID,size=1G,... as QEMU's -object; TYPE,help; JSON"),
    DRY_RUN,
    examples=("create memory-backend-memfd,id=ram0,size=64M,share=on", "create memory-backend-memfd,help"),
    hints=((r"^can't open backing store ",
            "the daemon opens the path: as its user, in its mount namespace, from its working directory"),))
def create(connection: Connection, options: Namespace) -> int:
    from gmemd.schema.keyval import parse_object

    effects = []
    for spec in options.spec:
        kind, _, rest = spec.partition(",")
        if "help" in (kind, rest):
            print_arguments(connection, "object-add", {} if kind == "help" else {"qom-type": kind})
            continue
        connection.asked = ("object-add", {"qom-type": kind})
        if effect := connection.change("object-add", parse_object(spec, warn=note, rooms=True)):
            effects.append(effect)
    if effects:
        connection.show(effects if len(effects) > 1 else effects[0])
    return DONE


@VERBS.add("remove objects", *IDS, YES, DRY_RUN, examples=("rm ram0 ram1", "rm 'vm0*' --dry-run", "rm --all --yes"))
def rm(connection: Connection, options: Namespace) -> int:
    status, effects = gather(connection, options, lambda name: connection.change("object-del", {"id": name}),
                             changes="remove {}", among=partial(_clones_first, connection))
    if connection.dry_run:
        show_all(connection, options, effects)
    return status


def _clones_first(connection: Connection) -> list[str]:
    """The ids of all objects, templates after the rest of the memory: one is not deleted before its clones."""
    ids, memory = connection.names("ids"), connection.memory()
    try:
        templates = {one["id"] for one in connection.execute("query-memdev-clones")}
    except QmpError:  # a server without this command
        return ids
    return [*sorted(memory, key=templates.__contains__), *ids[len(memory):]]


@VERBS.add("fetch objects' descriptors and show what they are", *IDS, examples=("get-fd ram0",))
def get_fd(connection: Connection, options: Namespace) -> int:
    def ask(name: str) -> dict[str, Any]:
        value: dict[str, Any]
        value, fds = connection.execute_fds("memdev-get-fd", {"id": name})
        for fd in fds:
            found = os.fstat(fd)
            value |= {
                "inode": found.st_ino,
                "device": f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}",
                "link": os.readlink(f"/proc/self/fd/{fd}"),
            }
            os.close(fd)
        return value

    def tell(name: str, value: dict[str, Any]) -> None:
        _print_fields({"id": name, **value} if are_several(options) else value)
        note(f"the descriptor is closed with this process; 'gmemctl exec {name} -- COMMAND' passes it on")

    return report(connection, options, ask, tell)

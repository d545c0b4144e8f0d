"""The verbs about the state and the holders of memory: survive, who, convert, ranges, top."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.chosen import are_several, report, report_table, statuses
from gmemd.cli.connection import DONE, Connection, note_lost
from gmemd.cli.parser import DRY_RUN, IDS, YES, Verbs, argument, seconds

VERBS = Verbs()
_SAID = {"yes": "yes", "no": "NO", "unknown": "unknown"}  # the SurvivalAnswer
_VISIBILITIES = ("private", "shared")


@VERBS.add("show what objects survive, and what to change", *IDS, examples=("survive", "survive ram0"),
           hints=((r"^objects are not kept", "'gmemctl survive' says what to change"),))
def survive(connection: Connection, options: Namespace) -> int:
    status, found, lost = statuses(connection, options)
    if connection.for_people:
        rows = [(one["id"], fate["event"], _SAID[fate["answer"]], fate.get("advice", ""))
                for one in found for fate in one["survival"]]
        rows += [(one["id"], "(lost already)", "NO", "") for one in lost]
        if rows or not options.id:
            rows.sort(key=lambda row: row[0])
            render.show(render.Table(("ID", "EVENT", "SURVIVES", "TO CHANGE THAT"), rows))
    else:
        connection.show([{"id": one["id"], "survival": one["survival"]} for one in found])
    note_lost(lost)
    return status


@VERBS.add("show which processes hold objects", *IDS, examples=("who ram0", "who --all"),
           hints=((r"^object '.*' is leased to process ",
                   "that process ends the lease with memdev-release, or by exiting; "
                   "see 'gmemctl call query-memdev-leases'"),))
def who(connection: Connection, options: Namespace) -> int:
    return report_table(
        connection, options, lambda name: connection.execute("query-memdev-holders", {"id": name}),
        ("PID", "COMMAND", "USER", "FDS", "MAPPED", "ACCESS", "CGROUP"),
        lambda found: [(str(holder["pid"]), holder["comm"], render.user(holder["uid"]), str(holder["fds"]),
                        render.size(holder["mapped"]), _access(holder), holder.get("cgroup", ""))
                       for holder in found],
        ("PID", "FDS", "MAPPED"))


def _access(holder: dict[str, Any]) -> str:
    return ("rw" if holder["writable"] else "ro") + (", private copy" if holder["private-copy"] else "")


@VERBS.add(
    "convert part of guest_memfds to private or shared", *IDS,
    argument("to", choices=_VISIBILITIES, nargs="?", help="what it is to become"),
    argument("--offset", metavar="SIZE", default="0", help="where it begins; default 0"),
    argument("--size", metavar="SIZE", help="default: to the end"),
    argument("--preserve", action="store_true", help="keep the content"), YES, DRY_RUN,
    examples=("convert gm0 private --offset 1M --preserve", "convert 'gm*' shared --yes"),
    hints=((r"^object '.*' is not a guest_memfd$",
            "only a guest_memfd has private parts: memory-backend-memfd with guest-memfd=on creates one"),))
def convert(connection: Connection, options: Namespace) -> int:
    # argparse counts the last of many words among them
    *options.id, to = [*options.id, *filter(None, [options.to])] or [""]
    if to not in _VISIBILITIES:
        raise UsageError(f"convert: after the ids comes what they are to become, private or shared; '{to}' is neither")
    offset = _bytes(options.offset)

    def ask(name: str) -> Any:
        [status] = connection.execute("query-memdev-status", {"id": name})
        size = status["size"] - offset if options.size is None else _bytes(options.size)
        return connection.change("memdev-convert", {"id": name, "offset": offset, "size": size, "to": to,
                                                    "preserve": options.preserve})

    def tell(name: str, done: dict[str, Any]) -> None:
        by = "simulated: holders can still access it" if done["simulated"] else "by the kernel"
        print(f"{name}: " * are_several(options) + f"{render.size(done['converted'])} became {to} ({by})")

    return report(connection, options, ask, tell, between="", changes=f"make {{}} {to}")


def _bytes(text: str) -> int:
    """A size as people write it: 4096, 64K, 1.5G, 0x1000."""
    from gmemd.schema.sizes import parse_size

    number = parse_size(text)
    if number is None:
        raise UsageError(f"'{text}' is not a size: use bytes, or k, M, G, T after the number")
    return number


@VERBS.add("list the private and shared parts of guest_memfds", *IDS, examples=("ranges gm0",))
def ranges(connection: Connection, options: Namespace) -> int:
    return report_table(
        connection, options, lambda name: connection.execute("query-memdev-ranges", {"id": name}),
        ("OFFSET", "SIZE", "VISIBILITY"),
        lambda found: [(f"{part['offset']:#x}", render.size(part["size"]), part["visibility"])
                       for part in found["ranges"]],
        ("OFFSET", "SIZE"))


@VERBS.add(
    "show what objects occupy, continuously",
    argument("-d", "--delay", type=seconds, default=2.0, metavar="SECONDS", help="between updates; default 2"),
    argument("-n", "--count", type=int, metavar="N", help="end after N times"),
    argument("--lines", type=int, default=20, metavar="N", help="the first N objects"),
    examples=("top", "top -n 1 --lines 5"))
def top(connection: Connection, options: Namespace) -> int:
    count = options.count
    while count is None or count > 0:
        found = sorted(connection.statuses(survival=not connection.for_people),
                       key=lambda status: (-status.get("resident", -1), str(status["id"])))
        if connection.for_people:
            _print_top(found, options.lines)
        elif connection.output == "name":
            connection.show(found[:options.lines])
        else:
            connection.show_message(found[:options.lines])
        sys.stdout.flush()
        count = None if count is None else count - 1
        if count != 0:
            time.sleep(options.delay)
    return DONE


def _print_top(found: list[dict[str, Any]], lines: int) -> None:
    rows = [(status["id"], status["kind"], render.size(status["size"]),
             render.size(status.get("resident")), _share(status), str(status["handed-out"]))
            for status in found[:lines]]
    if sys.stdout.isatty():
        from gmemd.cli.terminal import clear

        clear()
    known = [status["resident"] for status in found if "resident" in status]
    unknown = f", {len(found) - len(known)} unknown" * (len(known) < len(found))
    total = render.size(sum(status["size"] for status in found))
    print(f"{len(found)} objects, {render.size(sum(known))} of {total} in memory{unknown}")
    render.show(render.Table(("ID", "KIND", "SIZE", "RESIDENT", "", "OUT"), rows, ("SIZE", "RESIDENT", "", "OUT")))


def _share(status: dict[str, Any]) -> str:
    return f"{100 * status['resident'] // max(1, status['size'])}%" if "resident" in status else "?"

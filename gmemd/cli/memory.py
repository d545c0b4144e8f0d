"""gmemctl's verbs about what memory is in and who is at it: survive, who, convert, ranges, top, jobs, verify."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from gmemd.cli import render
from gmemd.cli.verbs import DONE, REFUSED, Connection, lost_objects, note, note_lost
from gmemd.cli.words import UsageError
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.cli.terminal import Bars

_POLL_SECONDS = 0.1
_SAID = {"yes": "yes", "no": "NO", "unknown": "unknown", "not-tried": "not tried"}  # the SurvivalAnswer


def survive(connection: Connection, options: Namespace) -> int:
    """What each object outlives, and what to change where it does not."""
    found = connection.execute("query-memdev-status", {"id": options.id} if options.id else {})
    lost = [] if options.id else lost_objects(connection)
    if connection.json:
        print(render.as_json([{"id": status["id"], "survival": status["survival"]} for status in found]))
    else:
        rows = [(status["id"], fate["event"], _SAID[fate["answer"]], fate.get("advice", ""))
                for status in found for fate in status["survival"]]
        rows += [(record["id"], "(lost already)", "NO", "") for record in lost]
        render.show(render.table(("ID", "EVENT", "SURVIVES", "TO CHANGE THAT"), sorted(rows, key=lambda row: row[0])))
    note_lost(lost)
    return DONE


def who(connection: Connection, options: Namespace) -> int:
    """Which processes hold an object."""
    found = connection.execute("query-memdev-holders", {"id": options.id})
    if connection.json:
        print(render.as_json(found))
        return DONE
    rows = [(str(holder["pid"]), holder["comm"], render.user(holder["uid"]), str(holder["fds"]),
             render.size(holder["mapped"]), _access(holder), holder.get("cgroup", "")) for holder in found]
    header = ("PID", "COMMAND", "USER", "FDS", "MAPPED", "ACCESS", "CGROUP")
    render.show(render.table(header, rows, ("PID", "FDS", "MAPPED")))
    return DONE


def _access(holder: dict[str, Any]) -> str:
    return ("rw" if holder["writable"] else "ro") + (", private copy" if holder["private-copy"] else "")


def convert(connection: Connection, options: Namespace) -> int:
    """Make a part of a guest_memfd private or shared."""
    [status] = connection.execute("query-memdev-status", {"id": options.id})
    offset = _bytes(options.offset)
    size = status["size"] - offset if options.size is None else _bytes(options.size)
    done = connection.change("memdev-convert", {"id": options.id, "offset": offset, "size": size, "to": options.to,
                                                "preserve": options.preserve})
    if done is None:
        return DONE
    if connection.json:
        print(render.as_json(done))
    else:
        by = "simulated: holders are not hindered" if done["simulated"] else "by the kernel"
        print(f"{render.size(done['converted'])} became {options.to} ({by})")
    return DONE


def _bytes(text: str) -> int:
    """A size as people write it: 4096, 64K, 1.5G, 0x1000."""
    from gmemd.schema.keyval import parse_object

    try:
        return int(parse_object(f"memory-backend-ram,id=x,size={text}")["size"])
    except QmpError:
        raise UsageError(f"'{text}' is no size: use bytes, or k, M, G, T behind the number") from None


def ranges(connection: Connection, options: Namespace) -> int:
    """Which parts of a guest_memfd are private and which shared."""
    found = connection.execute("query-memdev-ranges", {"id": options.id})
    if connection.json:
        print(render.as_json(found))
        return DONE
    rows = [(f"{part['offset']:#x}", render.size(part["size"]), part["visibility"]) for part in found["ranges"]]
    render.show(render.table(("OFFSET", "SIZE", "VISIBILITY"), rows, ("OFFSET", "SIZE")))
    return DONE


def jobs(connection: Connection, options: Namespace) -> int:
    """The jobs there are; with --cancel or --dismiss, do that to one."""
    for verb in ("cancel", "dismiss"):
        if getattr(options, verb):
            connection.change(f"job-{verb}", {"id": getattr(options, verb)})
            return DONE
    found = _follow(connection) if options.follow else connection.execute("query-jobs")
    if sys.stdout.isatty() and found and not connection.json:
        from gmemd.cli.terminal import print_jobs

        print_jobs(found)
    else:
        connection.show(found, "query-jobs")
    return DONE


def verify(connection: Connection, options: Namespace) -> int:
    """Read all that is in memory of an object, in a job, and show its progress."""
    job = f"verify-{options.id}-{time.time_ns():x}"
    connection.execute("memdev-verify", {"id": options.id, "job-id": job})
    [state] = _follow(connection, job)
    if state.get("error"):
        note(state["error"])
    else:
        digests = connection.execute("query-memdev-digests", {"job-id": job})
        if not digests:
            note(f"nothing of '{options.id}' is in memory")
        connection.show(digests, "query-memdev-digests")
    connection.execute("job-dismiss", {"id": job})
    return REFUSED if state.get("error") else DONE


def _follow(connection: Connection, job: str = "") -> list[dict[str, Any]]:
    """Wait until a job (all jobs) has ended, with bars at a terminal; what query-jobs says of it (them) then."""
    with _bars() as bars:
        while True:
            found = [state for state in connection.execute("query-jobs") if job in ("", state["id"])]
            if bars is not None:
                bars.show(found)
            if all(state["status"] == "concluded" for state in found):
                return found
            time.sleep(_POLL_SECONDS)


def _bars() -> AbstractContextManager[Bars | None]:
    if not sys.stderr.isatty():
        return nullcontext()
    from gmemd.cli.terminal import Bars

    return Bars()


def top(connection: Connection, options: Namespace) -> int:
    """The objects, by what they occupy, again and again."""
    count = options.count
    while count is None or count > 0:
        found = sorted(connection.execute("query-memdev-status"), key=lambda status: -status.get("resident", -1))
        rows = [(status["id"], status["kind"], render.size(status["size"]),
                 render.size_or_unknown(status.get("resident")), _share(status), str(status["handed-out"]))
                for status in found[:options.lines]]
        if sys.stdout.isatty():
            from gmemd.cli.terminal import clear

            clear()
        print(_summary(found))
        render.show(render.table(("ID", "KIND", "SIZE", "RESIDENT", "", "OUT"), rows, ("SIZE", "RESIDENT", "", "OUT")))
        sys.stdout.flush()
        count = None if count is None else count - 1
        if count != 0:
            time.sleep(options.delay)
    return DONE


def _share(status: dict[str, Any]) -> str:
    return f"{100 * status['resident'] // max(1, status['size'])}%" if "resident" in status else "?"


def _summary(found: list[dict[str, Any]]) -> str:
    resident = [status["resident"] for status in found if "resident" in status]
    unknown = len(found) - len(resident)
    return (f"{len(found)} objects, {render.size(sum(resident))} of "
            f"{render.size(sum(status['size'] for status in found))} in memory"
            + (f", {unknown} not known" if unknown else ""))

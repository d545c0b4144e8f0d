"""What gmemctl's verbs do: a function for each, called with the connection and the parsed options.

Each returns the exit status, raises QmpError when the server refuses (`Connection.asked` then says what), and
UsageError when the command line is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from gmemd.cli import render
from gmemd.cli.introspection import Introspection
from gmemd.cli.words import UsageError, arguments_of
from gmemd.client.client import Client
from gmemd.errors import QmpError

DONE, REFUSED = 0, 1
_HINT_SECONDS = 2.0  # a hint is not worth a longer wait


class Connection:
    """The client, what was last asked of the server, and how to print."""

    def __init__(self, client: Client, *, json: bool, dry_run: bool = False) -> None:
        self.client = client
        self.dry_run = dry_run  # changes are only judged
        self.json = json
        self.asked: tuple[str, dict[str, Any]] = ("", {})
        self._introspection: Introspection | None = None

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """Run a command and return its value; fds that come with it are closed, and told of."""
        self.asked = (command, arguments or {})
        value, received = self.client.execute_fds(command, arguments, fds=fds)
        for fd in received:
            note(f"received a descriptor of {os.readlink(f'/proc/self/fd/{fd}')}; 'gmemctl exec' can use one")
            os.close(fd)
        return value

    def change(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command that changes something; with --dry-run say what it would do, and return None."""
        if not self.dry_run:
            return self.execute(command, arguments)
        self.asked = (command, arguments)
        try:
            found = self.client.execute("query-command-effect", {"command": command, "arguments": arguments})
        except QmpError as error:
            if "query-command-effect" not in error.desc:
                raise
            raise UsageError("this server cannot judge commands without running them") from None
        if self.json:
            print(render.as_json({"command": command, **found}))
        else:
            print(f"{command} {found['effect']}" + ("" if found["complete"] else " (if the kernel lets it)"))
        return None

    def execute_fds(self, command: str, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
        """Run a command and return its value and fds, now the caller's."""
        self.asked = (command, arguments)
        return self.client.execute_fds(command, arguments)

    @property
    def introspection(self) -> Introspection:
        """What the server says of its commands; asked once."""
        if self._introspection is None:
            self._introspection = Introspection(self.client.execute("query-qmp-schema"))
        return self._introspection

    def names(self, kind: str) -> list[str]:
        """Return what there is of "ids" (lost ones, too), "commands", "jobs" or "events"."""
        if kind in ("commands", "events"):
            return self.introspection.names(kind.removesuffix("s"))
        if kind == "jobs":
            return [job["id"] for job in self.client.execute("query-jobs")]
        found = self.client.execute("qom-list", {"path": "/objects"})
        ids = [entry["name"] for entry in found if entry["type"].startswith("child<")]
        return ids + [record["id"] for record in lost_objects(self)]

    def show(self, value: Any, command: str = "") -> None:
        """Print what a command returned; people need not see that it is nothing."""
        if self.json:
            print(render.as_json(value))
        elif value not in ({}, []):
            has_members = isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
            order = self.introspection.result_members(command) if has_members and command else ()
            render.show(render.value(value, order))


def note(text: str) -> None:
    """Tell the user something that is not the result."""
    print(f"gmemctl: {text}", file=sys.stderr)


# -- the daily ones


def ls(connection: Connection, options: Namespace) -> int:
    found = connection.execute("query-memdev-status")
    lost = lost_objects(connection)
    if connection.json:
        print(render.as_json(found))
    else:
        header = ("ID", "TYPE", "KIND", "KERNEL", "SIZE", "RESIDENT", "OWNER", "AGE", "OUT")
        rows = sorted([*map(_row, found), *map(_lost_row, lost)])
        render.show(render.table(header, rows, ("SIZE", "RESIDENT", "OUT")))
    note_lost(lost)
    return DONE


def lost_objects(connection: Connection) -> list[dict[str, Any]]:
    """Return the objects whose memory did not come back with the daemon; none where nobody can tell."""
    try:
        found: list[dict[str, Any]] = connection.client.execute("query-memdev-lost")
    except QmpError:
        return []
    return found


def note_lost(lost: Sequence[dict[str, Any]]) -> None:
    """Tell of lost objects, and how their ids become free."""
    if lost:
        ids = " ".join(sorted(record["id"] for record in lost))
        note(f"the memory of {len(lost)} {'objects' if len(lost) > 1 else 'object'} is lost; "
             f"to forget about it and free the id: gmemctl rm {ids}")


def _lost_row(record: dict[str, Any]) -> tuple[str, ...]:
    kind = record["qom-type"].removeprefix("memory-backend-")
    return (record["id"], kind, "lost", "-", render.size(record["size"]), "-", "-", "-", "-")


def _row(status: dict[str, Any]) -> tuple[str, ...]:
    return (
        status["id"],
        status["qom-type"].removeprefix("memory-backend-"),
        status["kind"],
        status["kernel"],
        render.size(status["size"]),
        render.size_or_unknown(status.get("resident")),
        _owner(status),
        render.duration(status["age"]),
        str(status["handed-out"]),
    )


def _owner(status: dict[str, Any]) -> str:
    owner = status.get("owner")
    return f"{render.user(owner['uid'])}/{owner['pid']}" if owner else "-"


def show(connection: Connection, options: Namespace) -> int:
    [status] = connection.execute("query-memdev-status", {"id": options.id})
    [listed] = connection.execute("qom-list-get", {"paths": [f"/objects/{options.id}"]})
    properties = {
        entry["name"]: entry["value"]
        for entry in listed["properties"]
        if "value" in entry and entry["name"] != "type" and not entry["type"].startswith("child<")
    }
    if connection.json:
        print(render.as_json({"status": status, "properties": properties}))
        return DONE
    people = {"resident": "unknown", **status, "owner": _owner(status), "age": render.duration(status["age"]),
              "survival": ", ".join(fate["event"] for fate in status["survival"] if fate["survives"])}
    names = render.ordered(people, connection.introspection.result_members("query-memdev-status"))
    render.show(render.fields((name, _field(name, people[name])) for name in names))
    print()
    render.show(render.fields((name, _field(name, value)) for name, value in properties.items()))
    return DONE


def _field(name: str, value: Any) -> str:
    return render.exact_size(value) if name in render.BYTES and type(value) is int else render.cell(name, value)


def create(connection: Connection, options: Namespace) -> int:
    from gmemd.schema.keyval import parse_object

    for spec in options.spec:
        kind, _, rest = spec.partition(",")
        if "help" in (kind, rest):
            _print_help(connection, "object-add", {} if kind == "help" else {"qom-type": kind})
            continue
        connection.asked = ("object-add", {"qom-type": kind})
        connection.change("object-add", parse_object(spec, warn=note))
    return DONE


def rm(connection: Connection, options: Namespace) -> int:
    """Remove each of the objects, also behind one that is refused."""
    status = DONE
    for name in options.id:
        try:
            connection.change("object-del", {"id": name})
        except QmpError as error:
            explain(connection, error)
            status = REFUSED
    return status


def get_fd(connection: Connection, options: Namespace) -> int:
    value, fds = connection.execute_fds("memdev-get-fd", {"id": options.id})
    for fd in fds:
        found = os.fstat(fd)
        value |= {
            "inode": found.st_ino,
            "device": f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}",
            "link": os.readlink(f"/proc/self/fd/{fd}"),
        }
        os.close(fd)
    if connection.json:
        print(render.as_json(value))
    else:
        render.show(render.fields((name, _field(name, part)) for name, part in value.items()))
        note(f"the descriptor ends with this process; 'gmemctl exec {options.id} -- COMMAND' hands it on")
    return DONE


# -- everything the server knows


def call(connection: Connection, options: Namespace) -> int:
    known = connection.introspection if options.words else None
    if options.command is None:
        connection.show(connection.introspection.names("command"))
        return DONE
    words = list(options.words)
    if words and words[-1] in ("help", "?"):
        assert known is not None
        _print_help(connection, options.command, arguments_of(words[:-1], options.command, known))
        return DONE
    arguments = arguments_of(words, options.command, known) if known else None
    if connection.dry_run:
        connection.change(options.command, arguments or {})
        return DONE
    value = connection.execute(options.command, arguments, options.fd)
    connection.show(value, options.command)
    return DONE


def completion(connection: Connection, options: Namespace) -> int:
    """Print what completion scripts ask for, one a line."""
    names = connection.names(options.what)
    if names:
        print("\n".join(names))
    return DONE


def _print_help(connection: Connection, command: str, arguments: dict[str, Any]) -> None:
    known = connection.introspection
    if not known.entry(command):
        connection.execute(command)  # the server's own word for it
    tag = known.entry(known.entry(command).get("arg-type", "")).get("tag")
    rows = [
        (member.name, "" if member.optional else "needed", " ".join(member.features), known.describe(member.type))
        for member in known.members(command, arguments)
    ]
    render.show(render.table(("ARGUMENT", "", "FEATURES", "TYPE"), rows) if rows else f"{command} takes no arguments")
    if tag and tag not in arguments:
        print(f"and more, depending on {tag}: add {tag}=..., then help")


def qmp(connection: Connection, options: Namespace) -> int:
    from gmemd.cli.rawqmp import whole_messages

    text = sys.stdin.read() if options.text in (None, "-") else options.text
    data = text.encode("utf-8", "surrogateescape") + b" "  # ends a number, but no string
    count = whole_messages(data)
    if count is None:
        raise UsageError("the JSON is not complete; nothing was sent")
    replies = connection.client.send_text(data, count, fds=options.fd)
    for reply in replies:
        print(render.as_line(reply))
    return REFUSED if any("error" in reply for reply in replies) else DONE


def events(connection: Connection, options: Namespace) -> int:
    """Print events until enough have come, or the time is over (which is no failure), or for ever."""
    end = None if options.seconds is None else time.monotonic() + options.seconds
    left = options.count
    while left is None or left > 0:
        try:
            event = connection.client.wait_event(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except TimeoutError:
            break
        if options.name and event["event"] not in options.name:
            continue
        print(render.as_line(event) if connection.json else event_line(event), flush=True)
        left = None if left is None else left - 1
    return DONE


def event_line(event: dict[str, Any]) -> str:
    """Return an event on one line: time of day, name, data."""
    stamp = event.get("timestamp", {})
    clock = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    data = "  ".join(f"{name}={render.cell(name, value)}" for name, value in event.get("data", {}).items())
    return f"{clock}.{stamp.get('microseconds', 0):06}  {event['event']}  {data}".rstrip()


# -- refusals


def explain(connection: Connection, error: QmpError) -> None:
    """Print QEMU's sentence, and below it what may help."""
    from gmemd.cli.hints import Refusal, hints

    note(error.desc)
    client = connection.client
    ask = partial(client.execute, timeout=min(client.timeout or _HINT_SECONDS, _HINT_SECONDS))
    for line in hints(Refusal(error, *connection.asked, ask)):
        print(f"  hint: {line}", file=sys.stderr)

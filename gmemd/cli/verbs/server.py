"""The verbs for everything that a server knows: call, qmp, events."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError, arguments_of
from gmemd.cli.connection import DONE, REFUSED, Connection
from gmemd.cli.parser import DRY_RUN, FD, Verbs, argument, seconds

VERBS = Verbs()


@VERBS.add(
    "run any command of the server; without one, list them",
    argument("command", metavar="COMMAND", nargs="?", completes="commands"),
    argument("words", metavar="key=value", nargs="*", help="or JSON; 'help' lists the keys"), FD, DRY_RUN,
    examples=("call", "call object-add help", "call qom-get path=/objects/ram0 property=size"),
    hints=((r"^No file descriptor supplied via SCM_RIGHTS$",
            "send one: gmemctl call --fd 3 {command} ... 3<FILE"),))
def call(connection: Connection, options: Namespace) -> int:
    if options.command is None:
        connection.show(connection.introspection.names("command"))
        return DONE
    needs_help = options.words[-1:] in (["help"], ["?"])
    words = options.words[:-1] if needs_help else options.words
    arguments = arguments_of(words, options.command, connection.introspection) if words else {}
    if needs_help:
        print_arguments(connection, options.command, arguments)
        return DONE
    if connection.dry_run:
        value = connection.change(options.command, arguments) or {}
    else:
        value = connection.execute(options.command, arguments if words else None, options.fd)
    connection.show(value, options.command)
    return DONE


def print_arguments(connection: Connection, command: str, arguments: dict[str, Any]) -> None:
    """Print the arguments of a command; of the variants, the one that they select."""
    known = connection.introspection
    if not known.entry(command):
        connection.execute(command)  # the server's own word for it
    tag = known.entry(known.entry(command).get("arg-type", "")).get("tag")
    rows = [
        (member.name, "" if member.optional else "needed", " ".join(member.features), known.describe(member.type))
        for member in known.members(command, arguments)
    ]
    render.show(render.Table(("ARGUMENT", "", "FEATURES", "TYPE"), rows) if rows else f"{command} takes no arguments")
    if tag and tag not in arguments:
        print(f"and more, depending on {tag}: add {tag}=..., then help")


@VERBS.add("send raw QMP and print the replies",
           argument("text", metavar="JSON", nargs="?", help="without it, or with -, from standard input"), FD,
           examples=("""qmp '{"execute": "query-name", "id": 1}'""",))
def qmp(connection: Connection, options: Namespace) -> int:
    from gmemd.cli.rawqmp import whole_messages

    text = sys.stdin.read() if options.text in (None, "-") else options.text
    data = text.encode("utf-8", "surrogateescape") + b" "  # ends a number, but not a string
    count = whole_messages(data)
    if count is None:
        raise UsageError("the JSON is not complete; nothing was sent")
    replies = connection.client.send_text(data, count, fds=options.fd)
    for reply in replies:
        print(render.as_line(reply))
    return REFUSED if any("error" in reply for reply in replies) else DONE


@VERBS.add(
    "print events as they arrive",
    argument("name", metavar="NAME", nargs="*", completes="events", help="only these"),
    argument("-f", "--follow", action="store_true", help="until interrupted (the default)"),
    argument("-n", "--count", type=int, metavar="N", help="exit after N events"),
    argument("--for", type=seconds, metavar="SECONDS", dest="seconds", help="exit after that time"),
    examples=("events --for 0.1",))
def events(connection: Connection, options: Namespace) -> int:
    """Print events until enough have arrived, the time is over (which is not a failure), or it is interrupted."""
    end = None if options.seconds is None else time.monotonic() + options.seconds
    left = options.count
    while left is None or left > 0:
        try:
            event = connection.client.wait_event(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except TimeoutError:
            break
        if options.name and event["event"] not in options.name:
            continue
        print_event(connection, event)
        left = None if left is None else left - 1
    return DONE


def print_event(connection: Connection, event: dict[str, Any]) -> None:
    """Print an event: for people on one line with time of day, name and data."""
    if not connection.for_people:
        connection.show_message(event)
        return
    stamp = event.get("timestamp", {})
    clock = time.strftime("%H:%M:%S", time.localtime(stamp.get("seconds", 0)))
    data = "  ".join(f"{name}={render.cell(name, value)}" for name, value in event.get("data", {}).items())
    print(f"{clock}.{stamp.get('microseconds', 0):06}  {event['event']}  {data}".rstrip(), flush=True)

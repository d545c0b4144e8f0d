"""The verbs that send memory elsewhere: export, import, move, moves.

A line between two gmemd is a socket pair of ours: each daemon gets one end, or a command that leads to another host has
it as its standard input and output. What is sent does not pass through gmemctl, which may end at any time.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import DRY_RUN, FENCE, Verbs, argument, fence
from gmemd.cli.verbs.jobs import run_job
from gmemd.errors import QmpError
from gmemd.posix.sockets import path_of

VERBS = Verbs()
_LINE: Final = "gmemctl-line"
_CUT: Final = "the stream ends early"  # what a side says that hears no more of the other
_PATIENCE: Final = 30.0  # seconds until the other side has ended, too, when this one has
_POLL: Final = 0.02  # seconds

_ID = argument("id", metavar="ID", completes="ids")
_ROUNDS = (
    argument("--rounds", metavar="N", type=int, help="send what has changed at most N times before that; default 8"),
    argument("--downtime", metavar="MS", type=int, help="milliseconds that the last time may take; default 300"),
)


@VERBS.add("write an object's memory to the standard output, as a checked stream", _ID, *FENCE, *_ROUNDS, DRY_RUN,
           examples=("export ram0 > ram0.gmemd", "export ram0 | ssh host gmemctl import"))
def export(connection: Connection, options: Namespace) -> int:
    if sys.stdout.isatty() and not connection.dry_run:
        raise UsageError("export: the stream is not for a terminal: gmemctl export ID > FILE")
    arguments = {"id": options.id, "fdname": _LINE, **_tuning(options)}
    sys.stdout.flush()
    connection.execute("getfd", {"fdname": _LINE}, fds=[1])
    if connection.dry_run:
        return _effect(connection, "memdev-export", arguments)
    run_job(connection, "memdev-export", arguments)
    return DONE


@VERBS.add("make an object of the checked stream on the standard input",
           argument("--id", metavar="NEW-ID", help="the id of the object; default: the one that it had"),
           argument("--allow-inconsistent", action="store_true", help="even if writers were not kept away"),
           argument("--move", action="store_true",
                    help="be the other end of 'gmemctl move' or of its --resolve: answers go to the standard output"),
           examples=("import < ram0.gmemd", "import --id ram1 < ram0.gmemd"))
def import_(connection: Connection, options: Namespace) -> int:
    if sys.stdin.isatty():
        raise UsageError("import: the stream is not from a terminal: gmemctl import < FILE")
    arguments: dict[str, Any] = {"fdname": _LINE, "allow-inconsistent": options.allow_inconsistent}
    connection.execute("getfd", {"fdname": _LINE}, fds=[0])
    if options.move:
        connection.execute("getfd", {"fdname": f"{_LINE}-answers"}, fds=[1])
        arguments["answers"] = f"{_LINE}-answers"
    if options.id is not None:
        arguments["id"] = options.id
    found = run_job(connection, "memdev-import", arguments, lambda value, job: _arrived(connection, job))
    if not options.move:
        connection.show(found)
    return DONE


def _arrived(connection: Connection, job: str) -> dict[str, Any]:
    """What has come with a job."""
    for event in connection.client.take_events():
        if event["event"] == "MEMDEV_ARRIVED" and event["data"].get("job-id") == job:
            return {"id": event["data"]["id"]}
    return {}


@VERBS.add(
    "give an object to another gmemd, while its guest runs; or find out who owns it", _ID,
    argument("--to", metavar="URI",
             help="unix:PATH, the socket of the other gmemd; or exec:COMMAND, which leads to 'gmemctl import --move'"),
    *FENCE, *_ROUNDS,
    argument("--device-state", action="store_true",
             help="send the state of the guest's devices, too: there 'gmemctl rollback ID' lets the guest go on"),
    argument("--quit", action="store_true", help="end the VMM at --qmp once the object is given up"),
    argument("--postcopy", action="store_true", help="is refused, with the reason"),
    argument("--resolve", action="store_true",
             help="after a crash or a broken line: ask the other side who owns it, and end the move"),
    argument("--force", choices=("here", "there"), metavar="here|there",
             help="say who owns it where the other side is lost; if that is wrong, two do, or none"), DRY_RUN,
    examples=("move ram0 --to unix:/run/other/qmp.sock", "move vm1 --qmp vm1.sock --device-state --quit --to "
              "'exec:ssh host gmemctl import --move'", "move vm1 --resolve --to 'exec:ssh host gmemctl import --move'"),
    hints=((r"^object '(.*)' (?:was moved to|comes from) (.*), which has not confirmed it",
            "ask it: gmemctl move {0} --resolve --to URI"),
           (r"^the other side knows nothing of this move",
            "is it the right one? If it is, and the object is not there: gmemctl move ID --force here"),
           (r"was given up, and .* has not confirmed", "gmemctl move ID --resolve --to URI asks again")))
def move(connection: Connection, options: Namespace) -> int:
    if options.force is not None:
        arguments = {"id": options.id, "force": options.force}
        return _effect(connection, "memdev-move-resolve", arguments)
    if options.to is None:
        raise UsageError("move: --to says where: unix:PATH, or exec:COMMAND")
    if options.quit and options.qmp is None:
        raise UsageError("move: --quit needs --qmp")
    command = "memdev-move-resolve" if options.resolve else "memdev-move"
    arguments = {"id": options.id, "fdname": _LINE}
    if not options.resolve:
        arguments |= {"to": options.to, "postcopy": options.postcopy, "device-state": options.device_state,
                      **_tuning(options)}
    if connection.dry_run or options.postcopy:  # which is refused before there is a line
        return _without_line(connection, command, arguments)
    with _line(connection, options.to):
        run_job(connection, command, arguments)
    if options.quit and not options.resolve:
        _quit(options.qmp)
    return DONE


@VERBS.add("list objects that were moved, and whose move was left in the middle", examples=("moves",))
def moves(connection: Connection, options: Namespace) -> int:
    found = connection.execute("query-memdev-moves")
    if connection.for_people:
        rows = [(one["id"], one["state"], one["peer"], str(one["generation"]), one["token"]) for one in found]
        render.show(render.Table(("ID", "STATE", "PEER", "GENERATION", "TOKEN"), rows, ("GENERATION",)))
    else:
        connection.show(found, "query-memdev-moves")
    return DONE


# -- parts -------------------------------------------------------------------------------------------

def _tuning(options: Namespace) -> dict[str, Any]:
    """The arguments of the options about fence and rounds."""
    by_qmp = {"via": "qmp"} if options.qmp is not None else {}  # also where nobody else could write
    given = {"fence": {**by_qmp, **(fence(options) or {})} or None, "rounds": options.rounds,
             "downtime": options.downtime}
    return {name: value for name, value in given.items() if value is not None}


def _effect(connection: Connection, command: str, arguments: dict[str, Any]) -> int:
    """Run a command, or say what it would do."""
    if effect := connection.change(command, arguments):
        connection.show(effect)
    return DONE


def _without_line(connection: Connection, command: str, arguments: dict[str, Any]) -> int:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection.execute("getfd", {"fdname": _LINE}, fds=[ours.fileno()])
        return _effect(connection, command, arguments)


@contextmanager
def _line(connection: Connection, uri: str) -> Iterator[None]:
    """Give the server one end of a line, and another gmemd the other, which has ended with the block."""
    kind, _, rest = uri.partition(":")
    if kind not in ("unix", "exec") or not rest:
        raise UsageError(f"--to '{uri}': unix:PATH or exec:COMMAND")
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            ended = _beside(connection, path_of(uri), theirs) if kind == "unix" else _command(rest, theirs)
    except BaseException:
        ours.close()
        raise
    try:
        with ours:
            connection.execute("getfd", {"fdname": _LINE}, fds=[ours.fileno()])
        yield
    except BaseException as error:
        late = isinstance(error, TimeoutError)  # nobody waits for the server any longer
        if not late:
            with suppress(QmpError, OSError):  # its line may not have been taken
                connection.execute("closefd", {"fdname": _LINE})
        words = ended(0 if late else _PATIENCE)
        if words and words != _CUT:
            note(f"the other side: {words}")
        raise
    if words := ended(_PATIENCE):
        note(f"the other side: {words}")


def _beside(connection: Connection, path: str, line: socket.socket) -> Any:
    """Have the gmemd at a socket be at the other end; gives what waits for its end (seconds), and why it failed
    ("": it did not)."""
    from gmemd.client.client import Client

    try:
        other = Client(path, timeout=connection.client.timeout)
    except OSError as error:
        raise ConnectionError(f"cannot connect to {path}: {error.strerror or error}") from None
    job = f"import-{time.time_ns():x}"
    other.execute("getfd", {"fdname": _LINE}, fds=[line.fileno()])
    other.execute("memdev-import", {"fdname": _LINE, "answers": _LINE, "job-id": job})

    def ended(patience: float) -> str:
        until = time.monotonic() + patience
        with other, suppress(OSError, QmpError):
            while time.monotonic() < until:
                [state] = [one for one in other.execute("query-jobs") if one["id"] == job]
                if state["status"] == "concluded":
                    other.execute("job-dismiss", {"id": job})
                    return str(state.get("error", ""))
                time.sleep(_POLL)
        return "it does not say how it ended"

    return ended


def _command(command: str, line: socket.socket) -> Any:
    """The same by a command, whose errors go to our standard error."""
    process = subprocess.Popen(["sh", "-c", command], stdin=line.fileno(), stdout=line.fileno())

    def ended(patience: float) -> str:
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return f"'{command}' did not end"
        return "" if status == 0 else f"'{command}' has ended with status {status}"

    return ended


def _quit(path: str) -> None:
    from gmemd.vmm.ending import VmmError
    from gmemd.vmm.qemu import Qemu

    try:
        with Qemu(path, _PATIENCE) as qemu:
            qemu.quit()
    except VmmError as error:
        note(f"the VMM at '{path}' was not ended: {error}")

"""The verbs that save a guest and go back to it: checkpoint, rollback.

A checkpoint is a snapshot with the state of the guest's devices, so the verbs of `snapshot` list, verify and remove it,
too. Memory and device state are one pair: they come from one moment, and go back together.
"""

from __future__ import annotations

import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import COMMAND, DRY_RUN, Verbs, argument, socket_path
from gmemd.cli.verbs.handover import fill_in, place, placeholders
from gmemd.cli.verbs.jobs import run_job
from gmemd.cli.verbs.swap import swap
from gmemd.errors import QmpError
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu
from gmemd.vmm.start import Arranged, Guard, Started, arrange, reach

VERBS = Verbs()

_DEADLINE = 60.0  # seconds for which a guest may stand still
_LOADING = 60.0  # seconds; for a QEMU to start, and for each answer
_DELTA = 0.5  # of a full copy; what differs by more is saved in full again


@VERBS.add(
    "save a guest: its memory with the state of its devices",
    argument("id", metavar="ID", completes="ids"),
    argument("--qmp", metavar="PATH", type=socket_path, required=True, help="QMP socket of the QEMU in which it runs"),
    argument("--name", metavar="N", help="the checkpoint is called ID@N; default: the next number"),
    argument("--live", action="store_true", help="let QEMU send the memory by its own live migration"),
    argument("--swap", action="store_true", help="copy nothing: the guest goes on in COMMAND, with a private copy"),
    argument("--new-qmp", metavar="PATH", type=socket_path, help="with --swap: the QMP socket of that QEMU"),
    DRY_RUN, COMMAND,
    examples=("checkpoint vm1 --qmp /tmp/vm1.sock", "checkpoint vm1 --name tuesday --live --qmp /tmp/vm1.sock"))
def checkpoint(connection: Connection, options: Namespace) -> int:
    if options.live and options.swap:
        raise UsageError("checkpoint: --live or --swap, not both")
    if options.swap and not options.exec_command:
        raise UsageError("checkpoint: --swap needs a command: gmemctl checkpoint ID --swap --qmp PATH -- COMMAND")
    if not options.swap and (options.exec_command or options.new_qmp):
        raise UsageError("checkpoint: a command and --new-qmp are for --swap")
    name = None if options.name is None else f"{options.id}@{options.name}"
    if options.swap:
        return _swap(connection, options, name)
    limit = _DEADLINE if options.timeout is None else options.timeout
    arguments: dict[str, Any] = {
        "id": options.id, "live": True, "device-state": True,
        "fence": {"via": "qmp", "qmp": options.qmp, "deadline": max(int(limit * 1000), 1)}}
    if name is not None:
        arguments["name"] = name
    if options.live:
        arguments["migrate"] = True
    elif (parent := _previous_copy(connection, options.id)) is not None:
        arguments["parent"] = parent
    if connection.dry_run:
        if effect := connection.change("memdev-snapshot", arguments):
            connection.show(effect)
        return DONE
    with _going_on(options.qmp, limit):
        made = run_job(connection, "memdev-snapshot", arguments)
    connection.show(made) if not connection.for_people else print(made["name"])
    return DONE


def _swap(connection: Connection, options: Namespace, name: str | None) -> int:
    if connection.dry_run:
        raise UsageError("checkpoint: --swap starts a QEMU, which --dry-run cannot")
    made = swap(connection, options, name)
    connection.show(made) if not connection.for_people else print(made["name"])
    if connection.for_people:
        note(f"the guest runs in process {made['pid']}, QMP socket {made['qmp']}, on a private copy of '{options.id}'")
    return DONE


def _previous_copy(connection: Connection, name: str) -> str | None:
    """The snapshot that a checkpoint of an object is to be compared with: the newest full copy, while it is similar."""
    found = [one for one in connection.execute("query-memdev-snapshots", {"object": name}) if "problem" not in one]
    full = [one for one in found if one["stored"] in ("full", "reflink")]
    if not full:
        return None
    deltas = [one["bytes"] for one in found if one.get("parent") == full[-1]["name"]]
    return full[-1]["name"] if max(deltas, default=0) < _DELTA * full[-1]["bytes"] else None


@contextmanager
def _going_on(path: str, limit: float) -> Iterator[None]:
    """Do something with a guest by the daemon; if the daemon is lost meanwhile, let the guest go on ourselves.

    The next daemon does so, too, where there is one: it does not matter which of the two is first.
    `limit`: seconds for each answer.
    """
    with Qemu(path, limit) as qemu:
        ran = qemu.status() == "running"
    try:
        yield
    except ConnectionError:
        if ran:
            with suppress(VmmError), Qemu(path, limit) as qemu:
                if qemu.status() != "running":
                    qemu.cont()
        raise


@VERBS.add(
    "let a guest go on from a checkpoint, in a new QEMU",
    argument("checkpoint", metavar="ID[@N]", completes="snapshots", help="without @N the newest of the object"),
    argument("--qmp", metavar="PATH", type=socket_path, help="where the new QEMU is to have its QMP socket"), COMMAND,
    examples=("rollback vm1 --qmp /tmp/vm1.sock -- qemu-system-x86_64 -m 64M -display none -object "
              "memory-backend-file,id=ram,size=64M,share=on,mem-path={vm1} -machine pc,memory-backend=ram",),
    hints=((r"^there is no checkpoint of '(.*)'$", "'gmemctl checkpoint {} --qmp PATH' takes one"),))
def rollback(connection: Connection, options: Namespace) -> int:
    """Restore the memory, start the command, load the device state; return when the command has ended."""
    if not options.exec_command:
        raise UsageError("rollback needs a command: gmemctl rollback ID -- COMMAND")
    found = find(connection, options.checkpoint)
    with tempfile.TemporaryDirectory(prefix="gmemctl-") as directory:
        arranged = arrange(options.exec_command, options.qmp, f"{directory}/qmp.sock", incoming=True)
        if found["stored"] != "object":
            run_job(connection, "memdev-restore", {"name": found["name"], "id": found["object"]["id"], "force": True})
        started = _start_from(connection, found, arranged)
    note(f"'{found['object']['id']}' goes on from '{found['name']}' in process {started.pid}")
    connection.close()
    return _stay(started)


def find(connection: Connection, word: str) -> dict[str, Any]:
    """The checkpoint that a word names: its own name, or the id of an object, of which it is the newest one."""
    if "@" in word:
        [found] = connection.execute("query-memdev-snapshots", {"name": word})
        if "problem" not in found and "device-state" not in found:
            raise QmpError(f"snapshot '{word}' is not a checkpoint: it has no device state")
    else:
        listed = connection.execute("query-memdev-snapshots", {"object": word})
        if not (known := [one for one in listed if "device-state" in one]):
            raise QmpError(f"there is no checkpoint of '{word}'")
        found = known[-1]
    if "problem" in found:
        raise QmpError(f"checkpoint '{found['name']}' cannot be used: {found['problem']}")
    return dict(found)


def _start_from(connection: Connection, found: dict[str, Any], arranged: Arranged) -> Started:
    """Start the command on the object, load the device state, and let the guest run; if that fails, nothing runs."""
    name = found["object"]["id"]
    [status] = connection.execute("query-memdev-status", {"id": name})
    _, [state] = connection.execute_fds("memdev-get-snapshot", {"name": found["name"], "part": "device-state"})
    value, [memory] = connection.execute_fds("memdev-get-fd", {"id": name})
    places = place({name: memory}, {name: None})
    words = [fill_in(word, placeholders({name: value}, places)) for word in arranged.words]
    started = Started(words, [*places.values()], foreground=True)
    _pass_on(started)
    try:
        _claim(connection, name, started.pid, status["generation"])
        with Guard([started.pid]):
            started.go()
            with reach(started, arranged.qmp, _LOADING) as qemu:
                _check_mapped(connection, name, value["size"], started.pid)
                qemu.load_state(state)
                if qemu.status() != "running":
                    qemu.cont()
    except BaseException as error:
        started.kill()
        if isinstance(error, QmpError):
            said = started.words()
            why = error.desc if said in error.desc else f"{error.desc}; {said}"
            raise QmpError(f"the guest cannot go on from '{found['name']}': {why}") from error
        raise
    finally:
        for fd in (state, *places.values()):
            os.close(fd)
    return started


def _claim(connection: Connection, name: str, pid: int, generation: int) -> None:
    """Make a process the runner of an object; QmpError if another guest has run on the memory in between."""
    made = connection.execute("memdev-set-runner", {"id": name, "pid": pid})
    if made["generation"] != generation + 1:
        raise QmpError(f"another guest has run on '{name}' meanwhile, so the device state no longer fits")


def _check_mapped(connection: Connection, name: str, size: int, pid: int) -> None:
    """Refuse a VMM whose memory is not the object: it would load the device state onto other memory."""
    held = connection.execute("query-memdev-holders", {"id": name})
    if not any(one["pid"] == pid and one["mapped"] >= size for one in held):
        raise QmpError(f"the command has not mapped '{name}' as its memory: it finds it at {{{name}}}")


def _pass_on(started: Started) -> None:
    """From now on pass on to the command what ends us: it is never left alone."""
    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(started.pid, number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)


def _stay(started: Started) -> int:
    """Wait for the end of the command; its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command, too
    return started.wait()

"""`gmemctl fork`: many guests go on from one state, on one copy of its memory.

The memory becomes a template (memdev-freeze), each guest gets a clone of it, and its VMM maps that privately and loads
the device state. Either all guests run in the end, or what was made for them is gone again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from argparse import Namespace
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import COMMAND, Verbs, argument, socket_path
from gmemd.cli.verbs.checkpoints import find
from gmemd.cli.verbs.handover import fill_in, placeholders
from gmemd.cli.verbs.jobs import run_job
from gmemd.errors import QmpError
from gmemd.vmm.forking import Fork, Plan
from gmemd.vmm.start import arrange

VERBS = Verbs()
_TIMEOUT = 60.0  # seconds, for each VMM to start and to answer
_DEADLINE, _A_GIB = 10_000, 4_000  # milliseconds that a guest stands still at most, and more for each GiB
_WARNING = ("the guests have the same random numbers, keys, host name and MAC addresses inside until they change them: "
            "see 'Fork' in docs/qemu.md")


class _Source(NamedTuple):
    """What the guests go on from."""

    template: str  # the id of the frozen object
    size: int  # bytes
    state: int  # a descriptor of the device state


class _Guest(NamedTuple):
    """One of them, and what is unique to it."""

    id: str
    mac: str
    uuid: str


@VERBS.add(
    "let many guests go on from one, on one copy of its memory",
    argument("id", metavar="ID[@CHECKPOINT]", completes="ids",
             help="a checkpoint, by default the latest of ID; or with --qmp ID as it is now"),
    argument("-n", "--number", metavar="N", type=int, default=1, help="how many; default 1"),
    argument("--name", metavar="NAME", help="the ids of the clones, with {n} in it; default 'ID-{n}'"),
    argument("--qmp", metavar="PATH", type=socket_path,
             help="stop the guest by this socket of its QEMU, copy it, and let it go on"),
    argument("--template", metavar="NEW-ID", help="the id of the template that is made; default 'ID-template'"),
    COMMAND,
    examples=("fork ram0 -n 10 --name 'c{n}' --qmp ram0.qmp -- qemu-system-x86_64 -m 1G -machine q35,memory-backend=ram"
              " -object memory-backend-file,id=ram,size=1G,share=off,mem-path={ram0}",
              "fork ram0@2 -n 3 -- ./start-vm {ram0} {n} {mac} {uuid}"))
def fork(connection: Connection, options: Namespace) -> int:
    if not options.exec_command:
        raise UsageError("fork needs a command: gmemctl fork ID -n 10 -- COMMAND")
    if options.number < 1:
        raise UsageError("fork: -n must be at least 1")
    object_id = options.id.partition("@")[0]
    guests = _guests(options.name or f"{object_id}-{{n}}", options.number)
    timeout = options.timeout or _TIMEOUT
    with ExitStack() as undo, ExitStack() as ours:
        source = _frozen(connection, options, undo)
        ours.callback(os.close, source.state)
        plans = _plans(connection, object_id, guests, source, options.exec_command, undo)
        for plan in plans:
            ours.callback(os.close, *plan.fds)
        with Fork(plans, timeout) as forked:
            forked.load(source.state)
            _check_memory(connection, object_id, source, plans, forked.pids)
            for guest, pid in zip(guests, forked.pids, strict=True):
                connection.execute("memdev-set-runner", {"id": guest.id, "pid": pid})
            forked.go()
        undo.pop_all()
    connection.show([{"id": guest.id, "pid": pid, "qmp": plan.qmp, "mac": guest.mac, "uuid": guest.uuid}
                     for guest, plan, pid in zip(guests, plans, forked.pids, strict=True)])
    note(_WARNING)
    return DONE


def _guests(pattern: str, number: int) -> list[_Guest]:
    if number > 1 and "{n}" not in pattern:
        raise UsageError(f"fork: --name '{pattern}' needs {{n}}, or all clones have the same id")
    found: set[str] = set()
    while len(found) < number:
        found.add(f"52:54:00:{os.urandom(3).hex(':')}")
    return [_Guest(pattern.replace("{n}", str(index)), mac, str(uuid.uuid4()))
            for index, mac in enumerate(found, 1)]


# -- the template

def _frozen(connection: Connection, options: Namespace, undo: ExitStack) -> _Source:
    """The template, made if there is none yet, and the device state."""
    if options.qmp is None:
        return _of_checkpoint(connection, options, undo)
    if "@" in options.id:
        raise UsageError("fork: --qmp forks a guest as it is now, not a checkpoint")
    template = options.template or f"{options.id}-template"
    [status] = connection.execute("query-memdev-status", {"id": options.id})
    deadline = _DEADLINE + _A_GIB * status["size"] // (1 << 30)
    fence = {"via": "qmp", "qmp": options.qmp, "deadline": deadline}
    _, [state] = connection.execute_fds("memdev-clone", {
        "template": options.id, "id": template, "copy": True, "device-state": True, "fence": fence})
    undo.callback(_delete, connection, template)
    connection.execute("memdev-freeze", {"id": template})
    return _Source(template, status["size"], state)


def _of_checkpoint(connection: Connection, options: Namespace, undo: ExitStack) -> _Source:
    """The same of a checkpoint: its object itself if that is the memory, else a restored one, which is made once."""
    checkpoint = find(connection, options.id)
    name, size = checkpoint["name"], checkpoint["object"]["size"]
    if checkpoint["stored"] == "object":
        template = checkpoint["object"]["id"]
        connection.execute("memdev-freeze", {"id": template, "origin": checkpoint["uuid"]})
    else:
        template = _restored(connection, options, checkpoint, undo)
    _, [state] = connection.execute_fds("memdev-get-snapshot", {"name": name, "part": "device-state"})
    return _Source(template, size, state)


def _restored(connection: Connection, options: Namespace, checkpoint: dict[str, Any], undo: ExitStack) -> str:
    """The id of a template with the memory of a checkpoint; one that was made before is found by its origin."""
    for one in connection.execute("query-memdev-clones"):
        if one.get("origin") == checkpoint["uuid"] and options.template in (None, one["id"]):
            return str(one["id"])
    template = options.template or checkpoint["name"].replace("@", "-") + "-template"
    run_job(connection, "memdev-restore", {"name": checkpoint["name"], "id": template})
    undo.callback(_delete, connection, template)
    connection.execute("memdev-freeze", {"id": template, "origin": checkpoint["uuid"]})
    return str(template)


def _delete(connection: Connection, object_id: str) -> None:
    with suppress(QmpError, OSError):
        connection.execute("memdev-delete", {"id": object_id, "force": True})


# -- the guests

def _plans(connection: Connection, object_id: str, guests: list[_Guest], source: _Source, command: list[str],
           undo: ExitStack) -> list[Plan]:
    """A clone for each guest, and what to start on it."""
    folder = tempfile.mkdtemp(prefix="gmemd-fork-")  # for sockets that the command does not name
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    plans = []
    for index, guest in enumerate(guests, 1):
        connection.execute("memdev-clone", {"template": source.template, "id": guest.id})
        undo.callback(_delete, connection, guest.id)
        value, [fd] = connection.execute_fds("memdev-get-fd", {"id": guest.id})
        names = {object_id: value, "ID": value}
        known = {**placeholders(names, dict.fromkeys(names, fd)), "n": str(index), "mac": guest.mac,
                 "uuid": guest.uuid, "id": guest.id}
        words = [fill_in(word, known) for word in command]
        arranged = arrange(words, None, f"{folder}/{guest.id}.qmp", incoming=True)
        plans.append(Plan(guest.id, arranged.words, (fd,), arranged.qmp))
    if not any(plan.qmp.startswith(folder) for plan in plans):
        os.rmdir(folder)
    if len({plan.qmp for plan in plans}) < len(plans):
        raise UsageError("fork: every QEMU needs a QMP socket of its own: write {n} in its path")
    return plans


def _check_memory(connection: Connection, object_id: str, source: _Source, plans: list[Plan], pids: list[int]) -> None:
    """Refuse VMMs that have other memory: their guests would run on zeros."""
    [group] = connection.execute("query-memdev-clones", {"id": source.template})
    mapped = {one["pid"]: one["mapped"] for one in group["users"]}
    for plan, pid in zip(plans, pids, strict=True):
        if mapped.get(pid, 0) < source.size:
            raise QmpError(f"the VMM of '{plan.name}' has not mapped the memory: its backend needs "
                           f"mem-path={{{object_id}}},share=off")

"""The verbs that make a VMM's own memory gmemd's: run --capture, before it runs, and adopt, while it runs."""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import COMMAND, Verbs, argument
from gmemd.cli.verbs.handover import replace_process
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.vmm.capture import Memory
    from gmemd.vmm.memfds import Memfd

VERBS = Verbs()
_MEMFD = argument("--memfd", metavar="NAME", action="append", default=[],
                  help="also memfds of this name are guest memory; those of QEMU, Cloud Hypervisor, Firecracker, "
                       "crosvm and StratoVirt are known")


@VERBS.add(
    "run a VMM, and have the memfds that it creates for its guest be objects",
    argument("--capture", metavar="ID[,ID...]", required=True, completes="ids",
             help="the objects, those of equal size in the order in which it creates its own"),
    argument("--create", action="store_true", help="ids that do not exist are created, in the same order"), _MEMFD,
    COMMAND,
    examples=("run --capture vm1 -- qemu-system-x86_64 -object memory-backend-memfd,id=ram,size=1G ...",))
def run(connection: Connection, options: Namespace) -> int:
    """Replace this process by the command, with a supervisor beside it; return in the supervisor, or if that fails."""
    if not options.exec_command:
        raise UsageError("run needs a command: gmemctl run --capture ID -- COMMAND")
    from gmemd.vmm.beside import supervise
    from gmemd.vmm.capture import Capture
    from gmemd.vmm.memfds import RAM_NAMES
    from gmemd.vmm.seccomp import memory_filter

    ids = options.capture.split(",")
    if len(set(ids)) < len(ids):
        raise UsageError("run: an object is named twice")
    there = connection.memory()
    new = [name for name in ids if name not in there] if options.create else []
    objects = [_lend(connection, name) for name in ids if name not in new]
    connection.close()
    capture = Capture(objects, new, (*RAM_NAMES, *options.memfd), claim=partial(_claim_apart, connection),
                      adopt=partial(_adopt_apart, connection), say=note)

    def run_vmm(no_new_privs: bool) -> int:
        if no_new_privs:
            note("setuid programs that the VMM starts run without their rights (no_new_privs)")
        return replace_process(options.exec_command)

    return supervise(memory_filter([memory.size for memory in objects]), capture.serve, run_vmm,
                     keep=[memory.fd for memory in objects])


def _lend(connection: Connection, name: str) -> Memory:
    """An object's descriptor and size; QmpError if a VMM could not use it in the place of a memfd of its own."""
    from gmemd.vmm.capture import Memory
    from gmemd.vmm.memfds import is_writable

    value, [fd] = connection.execute_fds("memdev-get-fd", {"id": name})
    if value.get("offset"):
        raise QmpError(f"'{name}' begins at byte {value['offset']} of its file: a VMM's own memfd begins at 0")
    if not is_writable(fd):
        raise QmpError(f"'{name}' can only be read: no guest can run on it")
    return Memory(name, value["size"], fd)


def _claim_apart(connection: Connection, name: str, pid: int) -> None:
    """Make a process the runner, with a connection of its own: the daemon may have been restarted since the last."""
    try:
        connection.client.execute("memdev-set-runner", {"id": name, "pid": pid})
    finally:
        connection.close()


def _adopt_apart(connection: Connection, name: str, fd: int, pid: int) -> None:
    """The same for memory that becomes an object."""
    from gmemd.vmm.adoption import adopt

    try:
        adopt(connection.client, name, fd, pid)
    finally:
        connection.close()


@VERBS.add(
    "make the memory of a running VMM objects, which outlive it",
    argument("--pid", type=int, required=True, metavar="PID", help="its process"),
    argument("--id", action="append", default=[], metavar="NEW-ID",
             help="an id for each of its memories, by descriptor number; default vmPID, or vmPID.0, vmPID.1, ..."),
    _MEMFD, examples=("adopt --pid 4711 --id vm1",))
def adopt(connection: Connection, options: Namespace) -> int:
    from gmemd.vmm import adoption

    found = _memories(options)
    ids = options.id or ([f"vm{options.pid}"] if len(found) == 1 else
                         [f"vm{options.pid}.{number}" for number in range(len(found))])
    if len(ids) != len(found):
        raise UsageError(f"adopt: {len(ids)} ids for {len(found)} memories: {', '.join(map(_named, found))}")
    for memory in found:
        _check_new(connection, options.pid, memory)
    adopted: list[str] = []
    try:
        for name, memory in zip(ids, found, strict=True):
            fd = adoption.take(options.pid, memory)
            try:
                fixed = adoption.adopt(connection.client, name, fd, options.pid)
            finally:
                os.close(fd)
            adopted.append(name)
            if not fixed:
                note(f"'{name}' can be truncated by its VMM: it has forbidden seals")
    except BaseException:
        for name in adopted:
            with suppress(QmpError, OSError):
                connection.client.execute("memdev-clear-runner", {"id": name, "force": True})
                connection.client.execute("object-del", {"id": name})
        raise
    if connection.for_people:
        render.show(render.Table(("ID", "MEMFD", "SIZE"),
                                 [(name, memory.name or "guest_memfd", render.size(memory.size))
                                  for name, memory in zip(ids, found, strict=True)], ("SIZE",)))
    else:
        connection.show([{"id": name, "memfd": memory.name, "size": memory.size}
                         for name, memory in zip(ids, found, strict=True)])
    return DONE


def _check_new(connection: Connection, pid: int, memory: Memfd) -> None:
    """QmpError if the memory is an object already; only what the process is known to hold is looked at."""
    for status in connection.statuses():
        if status["size"] != memory.size or all(
                holder["pid"] != pid for holder in connection.execute("query-memdev-holders", {"id": status["id"]})):
            continue
        _, [fd] = connection.execute_fds("memdev-get-fd", {"id": status["id"]})
        there = os.fstat(fd)
        os.close(fd)
        if (there.st_dev, there.st_ino) == memory.file:
            raise QmpError(f"the memory {_named(memory)} is the object '{status['id']}' already")


def _memories(options: Namespace) -> list[Memfd]:
    """The guest memory of the process; QmpError if there is none or it may not be looked at."""
    from gmemd.vmm.adoption import refusal
    from gmemd.vmm.memfds import RAM_NAMES, describe, memfds

    try:
        every = list(memfds(options.pid))
    except OSError as exc:
        raise QmpError(refusal(options.pid, exc)) from exc
    names = (*RAM_NAMES, *options.memfd)
    found = [one for one in every if one.is_memory(names) and one.size]
    if not found:
        others = f"; it has the memfds {', '.join(map(_named, every))}: see --memfd" if every else ""
        raise QmpError(f"{describe(options.pid)} has no memfd that is a guest's memory{others}")
    return found


def _named(one: Memfd) -> str:
    return f"'{one.name or 'guest_memfd'}' ({render.size(one.size)}, descriptor {one.fd})"

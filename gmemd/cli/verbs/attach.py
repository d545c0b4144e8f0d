"""The verbs for memory of a running QEMU's guest: attach, detach."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from gmemd.cli.connection import DONE, Connection
from gmemd.cli.parser import Verbs, argument, socket_path
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.vmm.memfds import File

VERBS = Verbs()
_ANSWER, _GUEST = 10.0, 60.0  # seconds; how long a QEMU may take to answer, and a guest to take or give memory
_WORDS = {"virtio-mem-pci": "virtio-mem", "pc-dimm": "a DIMM"}
_ID = argument("id", metavar="ID", completes="ids", help="the object")
_QMP = argument("--qmp", metavar="PATH", type=socket_path, required=True, help="QEMU's QMP socket")


@VERBS.add(
    "give an object to a running QEMU, as more memory of its guest", _ID, _QMP,
    argument("--virtio-mem", dest="driver", action="store_const", const="virtio-mem-pci",
             help="as virtio-mem, which can be taken back in parts; default where QEMU can unplug it (8.2) and has a "
                  "free port"),
    argument("--dimm", dest="driver", action="store_const", const="pc-dimm", help="as a DIMM"),
    argument("--node", type=int, metavar="N", help="the guest's NUMA node"),
    examples=("attach ram1 --qmp /run/vm1.qmp --dimm",),
    hints=((r"no slots were allocated|not enough space|maxmem",
            "a QEMU takes memory while it runs if it was started with -m SIZE,slots=N,maxmem=SIZE"),))
def attach(connection: Connection, options: Namespace) -> int:
    from gmemd.vmm.attach import Memory
    from gmemd.vmm.attach import attach as attach_to
    from gmemd.vmm.qemu import Qemu

    value, [fd] = connection.execute_fds("memdev-get-fd", {"id": options.id})
    try:
        with Qemu(options.qmp, options.timeout or _ANSWER) as qemu:
            memory = Memory(options.id, value["size"], value.get("offset", 0), fd)
            with _runner(connection, options.id, qemu.pid):
                done = attach_to(qemu, memory, options.driver, options.node, options.timeout or _GUEST)
    finally:
        os.close(fd)
    if not connection.for_people:
        connection.show({"id": options.id, **done._asdict()})
    else:
        print(f"'{options.id}' is attached as {_WORDS[done.driver]}; the guest {done.guest}")
    return DONE


@VERBS.add(
    "take an object back from a running QEMU", _ID, _QMP, examples=("detach ram1 --qmp /run/vm1.qmp",))
def detach(connection: Connection, options: Namespace) -> int:
    from gmemd.vmm.attach import detach as detach_from
    from gmemd.vmm.qemu import Qemu

    file = _file(connection, options.id)
    with Qemu(options.qmp, options.timeout or _ANSWER) as qemu:
        detach_from(qemu, options.id, file, options.timeout or _GUEST)
        if file is not None and _runs(connection, options.id) == qemu.pid:
            connection.execute("memdev-clear-runner", {"id": options.id, "force": True})
    return DONE


@contextmanager
def _runner(connection: Connection, name: str, pid: int) -> Iterator[None]:
    """Make a process the runner of an object, which it stays if the block succeeds; QmpError if there is another."""
    before = _runs(connection, name)
    connection.execute("memdev-set-runner", {"id": name, "pid": pid})
    try:
        yield
    except BaseException:
        if before != pid:
            with suppress(QmpError, OSError):
                connection.execute("memdev-clear-runner", {"id": name, "force": True})
        raise


def _runs(connection: Connection, name: str) -> int | None:
    """The process that runs a guest on an object, as far as gmemd knows."""
    [status] = connection.execute("query-memdev-status", {"id": name})
    return status["runner"]["pid"] if "runner" in status else None


def _file(connection: Connection, name: str) -> File | None:
    """The device and inode of an object; None: it exists no longer, which is no reason to leave it in a QEMU."""
    try:
        _, [fd] = connection.execute_fds("memdev-get-fd", {"id": name})
    except QmpError:
        return None
    status = os.fstat(fd)
    os.close(fd)
    return status.st_dev, status.st_ino

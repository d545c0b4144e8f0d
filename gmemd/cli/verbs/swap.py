"""`gmemctl checkpoint --swap`: the guest goes on in a new QEMU with a private copy of its memory.

The memory stays as it is from then on, and with the state of the devices it is the checkpoint: nothing was copied. It
is frozen where possible, so any number of guests can go on from there; otherwise only until one runs on it.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from gmemd.cli.connection import Connection, note
from gmemd.cli.verbs.jobs import run_job
from gmemd.cli.verbs.replace import Replacement
from gmemd.errors import QmpError
from gmemd.vmm.compare import check_same, machine_of
from gmemd.vmm.ending import VmmError
from gmemd.vmm.handover import pass_on
from gmemd.vmm.qemu import Qemu

_STATE = "gmemctl-state"


def swap(connection: Connection, options: Namespace, name: str | None) -> dict[str, Any]:
    """Move the guest, and save its device state beside its memory; {name, pid, qmp}."""
    with ExitStack() as ends:
        moving = _Swap(connection, options, [options.id], ends)
        moving.check_old()
        moving.start()
        done = moving.carry_out()
        connection.execute("getfd", {"fdname": _STATE}, [moving.state])
        state = {"fdname": _STATE, "vmm": moving.vmm, "pause-ms": done.get("stopped-ms", 0)}
        try:
            made = run_job(connection, "memdev-snapshot", {
                "id": options.id, "state": state, **({} if name is None else {"name": name})})
        except QmpError as exc:
            raise QmpError(f"{exc.desc}; the guest runs in process {done['pid']}, on a private copy") from exc
    try:
        connection.execute("memdev-freeze", {"id": options.id})
    except QmpError as exc:
        note(f"'{options.id}' is not frozen, so one guest only can go on from there ({exc.desc})")
    return {"name": made["name"], "pid": done["pid"], "qmp": done["qmp"]}


class _Swap(Replacement):
    """A move that keeps the state in between, and whose new VMM leaves the memory as it is."""

    def __init__(self, connection: Connection, options: Namespace, ids: list[str], ends: ExitStack) -> None:
        super().__init__(connection, options, ids, ends)
        self.state = os.memfd_create("state")
        ends.callback(os.close, self.state)
        self.vmm = "QEMU " + ".".join(map(str, self.old.version))

    def check_new(self, new: Qemu) -> None:
        if (status := new.status()) != "inmigrate":
            raise VmmError(f"the new VMM does not wait for a state (status: {status})")
        news = {backend.id: backend for backend in new.backends()}
        for name, before in self.backends.items():
            after = news.get(name)
            if after is None or after.size != before.size:
                raise VmmError(f"the new VMM has no memory backend '{name}' of {before.size} bytes")
            if after.share:
                raise VmmError(f"the new VMM has '{name}' with share=on, so the guest would go on writing what is to "
                               "be the checkpoint: write share=off")
        if not any(one["pid"] == new.pid and one["private-copy"] for one in self.holders(self.ids[0])):
            raise VmmError(f"'{self.ids[0]}' is not memory of the new VMM")
        check_same(self.machine, machine_of(new))

    def transfer(self, new: Qemu) -> float:
        stopped = time.monotonic()
        self.old.stop()
        self.old.save_state(self.state)
        os.lseek(self.state, 0, os.SEEK_SET)
        new.load_state(self.state)
        pass_on(self.old, new)
        return time.monotonic() - stopped

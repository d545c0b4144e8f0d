"""Letting go on what was stopped for a copy, also if the daemon that stopped it ends or hangs: a process of its own
waits for that.

A note says what was stopped: {"processes": [[pid, start], ...], "groups": [PATH, ...]} as in `freeze`, and of a guest
{"qmp": PATH, "vmm": [pid, start]}. Letting go on what runs already does nothing.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.processes.freeze import resume
from gmemd.processes.identity import command_name, start_time
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu

STILL: Final = ("paused", "prelaunch", "postmigrate", "shutdown", "guest-panicked", "internal-error", "io-error",
                "watchdog")  # run states in which nothing runs until somebody continues the guest
_PATIENCE: Final = 5.0  # seconds for an answer
_GRACE: Final = 2.0  # seconds after the deadline, which is the daemon's

Note = dict[str, Any]


def let_go(note: Note) -> None:
    """Let all of it go on; QmpError: a guest could not be continued. Blocks."""
    resume(note)
    if note.get("vmm") is not None:
        resume_vmm(note["qmp"], note["vmm"])


def resume_vmm(path: str, process: list[int]) -> None:
    """Let the guest go on if its VMM, which gmemd had stopped, stands still."""
    pid, start = process
    if start_time(pid) != start:
        return
    with Qemu(path, _PATIENCE) as qemu:
        if qemu.pid != pid:
            raise VmmError(f"the VMM at '{path}' is no longer process {pid} ({command_name(pid)}), which was stopped")
        if qemu.status() in STILL:
            qemu.cont()


def guard(spec: Note) -> Iterator[dict[str, Any]]:
    """{"note": what will be stopped, "deadline": milliseconds}: says {"ready": true}, hears {"note": ...} when it
    changes and {"done": true} when everybody goes on."""
    note = spec["note"]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the daemon, which ends in its own way
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _overdue)
    signal.setitimer(signal.ITIMER_REAL, spec["deadline"] / 1000 + _GRACE)
    yield {"ready": True}
    try:
        while (line := sys.stdin.buffer.readline()).endswith(b"\n"):
            told = json.loads(line)
            if "done" in told:
                return
            note = told["note"]
    except TimeoutError:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    let_go(note)
    raise QmpError("the daemon did not let go on what it had stopped")


def _overdue(*_: object) -> None:
    raise TimeoutError


VERBS: Final = {"guard": guard}

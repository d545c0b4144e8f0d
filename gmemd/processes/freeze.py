"""Stopping processes so that they write nothing, and letting go on what was stopped.

By cgroup.freeze where a control group (version 2) has nothing but such processes, whose parents then do not notice;
otherwise by SIGSTOP through a pidfd. Both stop the threads that the kernel runs for a process, too (vhost, io_uring).
It is done when every task stands still: a stop signal only asks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator
from typing import Any, Final

from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.processes.identity import PROC, command_name, read, start_time

_PAUSES: Final = (0.0005, 0.02)  # seconds between two looks, at first and at most
_GONE: Final = (FileNotFoundError, ProcessLookupError)

Marks = dict[str, tuple[str, ...]]  # task: how often it has stopped running


class Stopped:
    """One process to be stopped by signals. Owns a pidfd."""

    def __init__(self, pid: int, start: int) -> None:
        """QmpError: it may not be stopped from here."""
        self.process = [pid, start]
        self._marks: Marks | None = None
        with os_errors(f"cannot stop process {pid} ({command_name(pid)})"):
            self._pidfd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(self._pidfd, 0)
            except BaseException:
                close_fd(self._pidfd)
                raise
        self.ours = not _stands(pid)  # otherwise somebody else has stopped it
        self._asked = False  # to stop

    def stop(self) -> None:
        """Ask it to stop."""
        if self.ours:
            self._asked = True
            self._send(signal.SIGSTOP)

    def wait(self, until: float) -> None:
        """Return when each of its tasks is stopped; QmpError when it is not by then (monotonic seconds)."""
        pid = self.process[0]
        for _ in _looks(until, f"process {pid} ({command_name(pid)}) does not stop"):
            if _stands(pid):
                break
        self._marks = _marks(pid)

    def check(self) -> None:
        """QmpError: it has run meanwhile."""
        pid, start = self.process
        if self._marks is not None and start_time(pid) == start and (_marks(pid) != self._marks or not _stands(pid)):
            raise QmpError(f"process {pid} ({command_name(pid)}) was continued by somebody else")

    def go(self) -> None:
        """Let it go on, if it was running before; QmpError: it has run meanwhile."""
        try:
            self.check()
        finally:
            if self._asked:
                self._send(signal.SIGCONT)
            self.drop()

    def drop(self) -> None:
        """Leave it as it is."""
        close_fd(self._pidfd)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


class Group:
    """A control group to be frozen."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._asked = False  # to freeze

    def stop(self) -> None:
        self._asked = True
        with os_errors(f"cannot freeze '{self.path}'"):
            _write(self.path, "1")

    def wait(self, until: float) -> None:
        """As for a process."""
        for _ in _looks(until, f"the control group '{self.path}' does not freeze"):
            if _frozen(self.path):
                return

    def check(self) -> None:
        """As for a process."""
        with contextlib.suppress(*_GONE):
            if read(f"{self.path}/cgroup.freeze").strip() != "1":
                raise QmpError(f"the control group '{self.path}' was thawed by somebody else")

    def go(self) -> None:
        try:
            self.check()
        finally:
            with contextlib.suppress(*_GONE):
                _write(self.path, "0")

    def drop(self) -> None: ...


class Freezer:
    """What is stopped, or to be: processes and control groups. Its methods block."""

    def __init__(self) -> None:
        self.pids: set[int] = set()
        self._parts: list[Stopped | Group] = []
        self._asked = 0  # of these

    def add(self, pids: Collection[int]) -> None:
        """Plan to stop these, too; QmpError if that is not possible."""
        new = set(pids) - self.pids
        for path, members in _groups(new):
            self._parts.append(Group(path))
            self.pids |= members
        for pid in sorted(new - self.pids):
            with os_errors(f"cannot see process {pid}"):
                start = start_time(pid)
            if start is not None:
                self._parts.append(Stopped(pid, start))
            self.pids.add(pid)

    def note(self) -> dict[str, Any]:
        """What is not stopped by anybody else, for `resume`."""
        return {"processes": [part.process for part in self._parts if isinstance(part, Stopped) and part.ours],
                "groups": [part.path for part in self._parts if isinstance(part, Group)]}

    def stop(self, until: float) -> None:
        """Stop what was added, and wait until it stands still."""
        new, self._asked = self._parts[self._asked:], len(self._parts)
        for part in new:
            part.stop()
        for part in new:
            part.wait(until)

    def check(self) -> None:
        """QmpError: something has run meanwhile."""
        for part in self._parts:
            part.check()

    def drop(self) -> None:
        """Leave all of it as it is."""
        for part in self._take():
            part.drop()

    def _take(self) -> list[Stopped | Group]:
        parts, self._parts, self._asked = self._parts, [], 0
        self.pids = set()
        return parts

    def go(self) -> None:
        """Let all of it go on; QmpError: something has run meanwhile."""
        parts = self._take()
        failures = []
        for part in reversed(parts):
            try:
                part.go()
            except (QmpError, OSError) as exc:
                failures.append(str(exc))
        if failures:
            raise QmpError(failures[0])


def resume(note: dict[str, Any]) -> None:
    """Let go on what a note of a Freezer says."""
    for path in note.get("groups", ()):
        with contextlib.suppress(OSError):
            _write(path, "0")
    for pid, start in note.get("processes", ()):
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(pid)
            try:
                if start_time(pid) == start:
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            finally:
                close_fd(pidfd)


# -- one process -------------------------------------------------------------------------------------

def _tasks(pid: int) -> Iterator[tuple[str, str]]:
    """The tasks of a process that have not ended, and their states (proc_pid_stat(5))."""
    with contextlib.suppress(*_GONE):
        for task in os.listdir(f"{PROC}/{pid}/task"):
            with contextlib.suppress(*_GONE):
                state = read(f"{PROC}/{pid}/task/{task}/stat").rpartition(")")[2].split()[0]
                if state not in "ZX":
                    yield task, state


def _stands(pid: int) -> bool:
    """Whether every task is stopped by a signal, or none is left.

    A list of tasks that does not change while all of them are stopped is complete: who is stopped starts none.
    """
    before: set[str] | None = None
    while True:
        found = dict(_tasks(pid))
        if any(state != "T" for state in found.values()):
            return False
        if set(found) == before:
            return True
        before = set(found)


def _marks(pid: int) -> Marks:
    """How often each task has been switched away from: more often, if it has run and stands still again."""
    found = {}
    for task, _ in _tasks(pid):
        with contextlib.suppress(*_GONE):
            found[task] = tuple(line for line in read(f"{PROC}/{pid}/task/{task}/status").splitlines()
                                if "_ctxt_switches" in line)
    return found


def _looks(until: float, complaint: str) -> Iterator[None]:
    """Yield again and again, until then; then QmpError."""
    pause, longest = _PAUSES
    while True:
        yield
        if time.monotonic() > until:
            raise QmpError(complaint)
        time.sleep(pause)
        pause = min(2 * pause, longest)


# -- control groups ----------------------------------------------------------------------------------

def _groups(pids: Collection[int]) -> Iterator[tuple[str, set[int]]]:
    """The control groups that can be frozen: not frozen, and with none but these processes in them or below."""
    mount = _mount()
    paths = {path for pid in pids if mount and (path := _group(mount, pid))}
    for path in sorted(paths):
        if not any(path.startswith(f"{other}/") for other in paths):
            with contextlib.suppress(OSError, ValueError):
                members = _members(path)
                if members and members <= set(pids) and read(f"{path}/cgroup.freeze").strip() == "0" \
                        and os.access(f"{path}/cgroup.freeze", os.W_OK):
                    yield path, members


def _mount() -> str:
    """Where the control groups of version 2 are mounted; "": nowhere."""
    with contextlib.suppress(OSError):
        for line in read(f"{PROC}/self/mountinfo").splitlines():
            fields, _, kind = line.partition(" - ")
            if kind.startswith("cgroup2 ") and fields.split()[3] == "/":
                return fields.split()[4]
    return ""


def _group(mount: str, pid: int) -> str:
    """The directory of a process's control group; "" for the root, which cannot be frozen."""
    with contextlib.suppress(OSError):
        for line in read(f"{PROC}/{pid}/cgroup").splitlines():
            if line.startswith("0::"):
                path = os.path.normpath(f"{mount}/{line[3:]}")
                return path if path != mount and os.path.exists(f"{path}/cgroup.freeze") else ""
    return ""


def _members(path: str) -> set[int]:
    """The processes in a control group and below."""
    return {int(word) for folder, _, files in os.walk(path) if "cgroup.procs" in files
            for word in read(f"{folder}/cgroup.procs").split()}


def _frozen(path: str) -> bool:
    try:
        return "frozen 1" in read(f"{path}/cgroup.events")
    except _GONE:
        return True


def _write(path: str, text: str) -> None:
    with open(f"{path}/cgroup.freeze", "w") as file:
        file.write(text)

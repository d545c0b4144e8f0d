"""A guest goes from one VMM to another on the same memory; or, when that was interrupted, to where it can run.

The new VMM never begins to run by itself, because the state that it loads is that of a stopped guest. So whether it
runs says how far the move came: if it runs, the old one is over; if not, it is ended first, and only then may the old
one go on. Both the client that moves the guest and the daemon that finds it dead follow this rule, and either may
repeat it at any time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator

from gmemd.vmm.qemu import Qemu, VmmError

_NEXT = ".next-"  # in the name of a socket on which a VMM listens until the old one's place is free

_DEAD = 30.0  # seconds in which a killed process must have ended
_STOPPED = ("paused", "postmigrate", "finish-migrate")  # by a move
_ACTIVE = ("setup", "active", "device", "pre-switchover", "postcopy-active", "wait-unplug", "cancelling")


def next_to(qmp: str) -> str:
    """A path for the new VMM's socket, which `settle` renames to the old one's when that has ended.

    Another one each time: QEMU removes the path that it was given when it ends, whatever is there by then.
    """
    return f"{qmp}{_NEXT}{os.urandom(3).hex()}"


class Party:
    """One of the two VMMs: its process, whatever may get its id later, and its QMP socket."""

    def __init__(self, pid: int, qmp: str, pidfd: int | None) -> None:
        self.pid = pid
        self.qmp = qmp
        self._pidfd = pidfd  # owned; None: it has ended

    @classmethod
    def of(cls, pid: int, qmp: str) -> Party:
        """The process that has the id now. OSError: it cannot be watched."""
        try:
            return cls(pid, qmp, os.pidfd_open(pid))
        except ProcessLookupError:
            return cls(pid, qmp, None)

    def __enter__(self) -> Party:
        return self

    def __exit__(self, *error: object) -> None:
        self.forget()

    def forget(self) -> None:
        """It is not the process that was meant, which therefore has ended."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def lives(self, seconds: float = 0) -> bool:
        """Whether it has not ended, now or in that time."""
        return self._pidfd is not None and not select.select([self._pidfd], [], [], seconds)[0]

    def kill(self) -> None:
        """End it; VmmError unless it has certainly ended."""
        if not self.lives():
            return
        assert self._pidfd is not None
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except OSError as exc:
            raise VmmError(f"cannot end process {self.pid}: {exc.strerror}") from exc
        if self.lives(_DEAD):
            raise VmmError(f"process {self.pid} was killed and does not end")


def move(old: Qemu, new: Qemu) -> float:
    """Stop the guest in one VMM and let it go on in the other; how many seconds it was stopped.

    VmmError at any step: `settle` then.
    """
    reader, writer = os.pipe()
    try:
        try:
            new.begin_load(reader)  # it waits for the first byte
        finally:
            os.close(reader)
        old.prepare(writer)
        stopped = time.monotonic()
        old.stop()
        old.begin_save()
    finally:
        os.close(writer)
    old.wait_migration()
    new.wait_loaded()
    new.cont()
    return time.monotonic() - stopped


def settle(old: Party, new: Party, timeout: float = 30.0, *, moved: bool = False) -> str:
    """Let the guest run in one of the two; where it does: "new", "old", or "none" if both have ended.

    The other one has ended then. `timeout` (seconds) is for each answer. `moved`: it is known to have run in the new
    one, so the old one, whose memory it has changed, must not go on. VmmError: it is not certain, try again.
    """
    with _reached(new, (new.qmp, old.qmp), timeout) as monitor:
        if monitor is not None and _runs(monitor, last=not old.lives()):
            finish(old, new, timeout)
            return "new"
    new.kill()
    if _is_temporary(old, new):
        with contextlib.suppress(OSError):
            os.unlink(new.qmp)
    if moved:
        old.kill()
    if not old.lives():
        return "none"
    with _reached(old, (old.qmp,), timeout) as monitor:
        if monitor is None:
            raise VmmError(f"the VMM at '{old.qmp}' (process {old.pid}) cannot be reached")
        resume(monitor)
    return "old"


def _is_temporary(old: Party, new: Party) -> bool:
    return new.qmp.startswith(old.qmp + _NEXT)


def finish(old: Party, new: Party, timeout: float) -> None:
    """The guest runs in the new VMM: end the old one, and give the new one its place."""
    with _reached(old, (old.qmp,), timeout) as monitor:
        if monitor is not None:
            with contextlib.suppress(VmmError):
                monitor.quit()
    old.kill()
    if _is_temporary(old, new):
        with contextlib.suppress(OSError):  # it is there already, or not ours to rename
            os.rename(new.qmp, old.qmp)


def resume(monitor: Qemu) -> None:
    """Let a guest go on that was stopped in order to be moved, and was not."""
    deadline = time.monotonic() + monitor.timeout
    while _is_active(monitor):
        if time.monotonic() > deadline:
            raise VmmError(f"the VMM at '{monitor.path}' does not cancel the transfer of its state")
        monitor.cancel()
        time.sleep(0.01)
    monitor.close_pipe()
    monitor.capabilities(x_ignore_shared=False)
    if monitor.status() in _STOPPED:
        monitor.cont()


def _is_active(monitor: Qemu) -> bool:
    found = monitor.ask("query-migrate")
    return isinstance(found, dict) and found.get("status") in _ACTIVE


def _runs(monitor: Qemu, *, last: bool) -> bool:
    """Whether the guest runs in the new VMM; `last`: the old one has ended, so it is let go if it is loaded.

    One that does not answer does not run: it is killed.
    """
    with contextlib.suppress(VmmError):
        runs = monitor.status() == "running"
        if last and not runs and monitor.ask("query-migrate"):
            monitor.wait_loaded()
            monitor.cont()
            runs = True
        if runs:
            monitor.capabilities(x_ignore_shared=False)
        return runs
    return False


@contextlib.contextmanager
def _reached(party: Party, paths: tuple[str, ...], timeout: float) -> Iterator[Qemu | None]:
    """A connection to a VMM at one of these paths; None where it is not, has ended, or does not answer.

    What it does not answer inside the block does not count as an answer: the block is left.
    """
    monitor = None
    for path in paths if party.lives() else ():
        with contextlib.suppress(VmmError):
            monitor = Qemu(path, timeout)
            if monitor.pid == party.pid:
                break
            monitor.close()
            monitor = None
    try:
        yield monitor
    finally:
        if monitor is not None:
            monitor.close()

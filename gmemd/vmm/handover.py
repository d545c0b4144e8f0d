"""A guest goes from one VMM to another on the same memory; or, when that was interrupted, to where it can run.

The new VMM never begins to run by itself, because the state that it loads is that of a stopped guest. Before it may
run, the old one gets a mark, which lasts as long as its process, whoever else dies. Without the mark the guest has not
run in the new one: that is ended, and only then the old one goes on. With it the old one is over, because the guest may
have changed its memory and its disks since. Both the client that moves the guest and the daemon that finds it dead
follow this rule, and either may repeat it at any time.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Protocol

from gmemd.errors import QmpError
from gmemd.vmm.ending import VmmError, kill
from gmemd.vmm.qemu import Qemu

_MARK = "gmemd-passed-on"  # the id of an object in a VMM whose guest may run in another one
_NEXT = ".next-"  # in the name of a socket on which a VMM listens until the old one's place is free

_STOPPED = ("paused", "postmigrate", "finish-migrate")  # by a move
_ACTIVE = ("setup", "active", "device", "pre-switchover", "postcopy-active", "wait-unplug", "cancelling")


def next_to(qmp: str) -> str:
    """A path for the new VMM's socket, which `settle` renames to the old one's when that has ended.

    Another one each time: QEMU removes the path that it was given when it ends, whatever is there by then.
    """
    return f"{qmp}{_NEXT}{os.urandom(3).hex()}"


class Files(Protocol):
    """How sockets are found by their paths. OSError from every method."""

    def socket(self, path: str) -> contextlib.AbstractContextManager[str]:
        """Where to connect to the socket at a path, meanwhile."""
        ...

    def stat(self, path: str) -> os.stat_result:
        """As stat(2)."""
        ...

    def unlink(self, path: str) -> None:
        """As unlink(2)."""
        ...

    def rename(self, path: str, to: str) -> None:
        """As rename(2)."""
        ...


class Anywhere:
    """As the functions of `os` find them."""

    def socket(self, path: str) -> contextlib.AbstractContextManager[str]:
        return contextlib.nullcontext(path)

    def stat(self, path: str) -> os.stat_result:
        return os.stat(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rename(self, path: str, to: str) -> None:
        os.rename(path, to)


class Party:
    """One of the two VMMs: its process, whatever may get its id later, and its QMP socket."""

    def __init__(self, pid: int, qmp: str, pidfd: int | None, files: Files) -> None:
        self.pid = pid
        self.qmp = qmp
        self.files = files
        self._pidfd = pidfd  # owned; None: it has ended

    @classmethod
    def of(cls, pid: int, qmp: str, files: Files | None = None) -> Party:
        """The process that has the id now. OSError: it cannot be watched."""
        try:
            pidfd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            pidfd = None
        return cls(pid, qmp, pidfd, files or Anywhere())

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
        if self._pidfd is not None and self.lives():
            kill(self._pidfd, self.pid)


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
    pass_on(old, new)
    return time.monotonic() - stopped


def pass_on(old: Qemu | None, new: Qemu) -> None:
    """Let the guest run in the new VMM, which has its state, and never again in the old one (None: it has ended).

    VmmError: `settle` then.
    """
    if old is not None:
        try:
            old.ask("object-add", {"qom-type": "secret", "id": _MARK, "data": "x"})
        except VmmError:
            if not _has_mark(old):
                raise
    try:
        new.cont()
    except VmmError as exc:
        # refused, or ended before it could say so: it has not run there, but for what takes no time
        if old is not None and isinstance(exc.__cause__, QmpError | ConnectionError):
            old.ask("object-del", {"id": _MARK})
        raise


def _has_mark(old: Qemu) -> bool:
    return any(one.get("name") == _MARK for one in old.ask_list("qom-list", {"path": "/objects"}))


def settle(old: Party, new: Party, timeout: float = 30.0, *, moved: bool = False) -> str:
    """Let the guest run in one of the two; where it does: "new", "old", or "none" if both have ended.

    The other one has ended then. `timeout` (seconds) is for each answer. `moved`: it is known to have run in the new
    one. VmmError: it is not certain, try again.
    """
    if (moved and new.lives()) or _goes_on(old, new, timeout):
        finish(old, new, timeout)
        return "new"
    new.kill()
    if _is_temporary(old, new):
        with contextlib.suppress(OSError):
            new.files.unlink(new.qmp)
    if old.lives() and not _resumes(old, timeout):
        old.kill()
    return "old" if old.lives() else "none"


def _goes_on(old: Party, new: Party, timeout: float) -> bool:
    """Whether the guest runs in the new VMM, or does so now because it can no longer in the old one; False: it has not.

    False also if that has ended.
    """
    with _reached(new, (new.qmp, old.qmp), timeout) as monitor:
        status = None if monitor is None else _status(monitor)
        if status == "running":
            return True
        if status == "inmigrate" and old.lives():
            return False
        with _reached(old, (old.qmp,), timeout) as former:
            if former is None and old.lives():
                raise _unreachable(old)
            if former is not None and not _has_mark(former):
                return False
            if monitor is None or status is None:
                if new.lives() and (_exists(new, new.qmp) or _exists(new, old.qmp)):
                    raise _unreachable(new)
                return False
            return _let_go(former, monitor)


def _let_go(old: Qemu | None, new: Qemu) -> bool:
    """Let the guest go on in the new VMM; False: it has no state, or cannot run there."""
    try:
        if not new.ask("query-migrate"):
            return False
        new.wait_loaded()
        pass_on(old, new)
    except VmmError as exc:
        if isinstance(exc.__cause__, TimeoutError):
            raise
        return False
    return True


def _resumes(old: Party, timeout: float) -> bool:
    """Let the guest go on in the old VMM; False: it may have run in the other one."""
    with _reached(old, (old.qmp,), timeout) as monitor:
        if monitor is None:
            raise _unreachable(old)
        if _has_mark(monitor):
            return False
        resume(monitor)
    return True


def _status(monitor: Qemu) -> str | None:
    """The run state; None: it does not answer."""
    with contextlib.suppress(VmmError):
        return monitor.status()
    return None


def _unreachable(party: Party) -> VmmError:
    return VmmError(f"the VMM at '{party.qmp}' (process {party.pid}) cannot be reached")


def _exists(party: Party, path: str) -> bool:
    with contextlib.suppress(OSError):
        party.files.stat(path)
        return True
    return False


def _is_temporary(old: Party, new: Party) -> bool:
    return new.qmp.startswith(old.qmp + _NEXT)


def finish(old: Party, new: Party, timeout: float) -> None:
    """The guest runs in the new VMM: end the old one, and give the new one its place."""
    with _reached(old, (old.qmp,), timeout) as monitor:
        if monitor is not None:
            with contextlib.suppress(VmmError):
                monitor.quit()
    old.kill()
    with _reached(new, (new.qmp,), timeout) as monitor, contextlib.suppress(VmmError):
        if monitor is not None:
            monitor.capabilities(x_ignore_shared=False)
    if _is_temporary(old, new):
        with contextlib.suppress(OSError):  # it is there already, or not ours to rename
            new.files.rename(new.qmp, old.qmp)


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


@contextlib.contextmanager
def _reached(party: Party, paths: tuple[str, ...], timeout: float) -> Iterator[Qemu | None]:
    """A connection to a VMM at one of these paths; None where it is not, has ended, or does not answer.

    What it does not answer inside the block does not count as an answer: the block is left.
    """
    monitor = None
    for path in paths if party.lives() else ():
        with contextlib.suppress(VmmError, OSError), party.files.socket(path) as address:
            monitor = Qemu(path, timeout, address=address)
            if monitor.pid == party.pid:
                break
            monitor.close()
            monitor = None
    try:
        yield monitor
    finally:
        if monitor is not None:
            monitor.close()

"""Where a guest goes on when its move to another QEMU was interrupted: in one of the two, never in a doubtful one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.vmm.ending import VmmError
from gmemd.vmm.handover import Party, move, settle
from gmemd.vmm.qemu import Qemu
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE
from tests.vmm.test_qemu import World

pytestmark = [pytest.mark.e2e, needs_qemu]


class Moving(World):
    """A guest in one QEMU, and a second one that waits for it."""

    def __init__(self, directory: Path, ends: ExitStack) -> None:
        super().__init__(directory, ends)
        self.qemus = self.start("first"), self.start("second", "-incoming", "defer")
        self.guest.wait_runs()
        self.old, self.new = (ends.enter_context(Party.of(qemu.pid, qemu.path)) for qemu in self.qemus)

    def move(self) -> None:
        """Move the guest, as a client that dies then."""
        try:
            move(*self.qemus)
        finally:
            for qemu in self.qemus:
                qemu.close()


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[Moving]:
    with ExitStack() as ends:
        yield Moving(tmp_path, ends)


def test_a_guest_that_has_run_on_does_not_go_back(moving: Moving) -> None:
    """The new QEMU ended before anybody looked: the state in the old one does not fit the memory any more."""
    moving.move()
    moving.guest.wait_runs()
    moving.processes["second"].kill()
    moving.processes["second"].wait(PATIENCE)
    assert settle(moving.old, moving.new) == "none"
    assert moving.processes["first"].wait(PATIENCE) == -signal.SIGKILL


def test_a_new_qemu_that_is_silent_may_run(moving: Moving) -> None:
    """As long as it does not answer, nothing happens to either."""
    moving.move()
    os.kill(moving.new.pid, signal.SIGSTOP)
    with pytest.raises(VmmError, match=rf"the VMM at '\S+' \(process {moving.new.pid}\) cannot be reached"):
        settle(moving.old, moving.new, 0.2)
    assert moving.old.lives()
    os.kill(moving.new.pid, signal.SIGCONT)
    assert settle(moving.old, moving.new) == "new"
    moving.guest.wait_runs()
    assert moving.processes["first"].wait(PATIENCE) == 0


@pytest.mark.parametrize(("cause", "result"), [(QmpError("not now"), "old"), (ConnectionResetError(), "old"),
                                             (TimeoutError(), "new")])
def test_the_last_step(moving: Moving, monkeypatch: pytest.MonkeyPatch, cause: Exception, result: str) -> None:
    """A new QEMU that refuses to let the guest run, or ends; a client that does not ask for it any more."""
    def cont(qemu: Qemu) -> None:
        raise VmmError("no") from cause

    monkeypatch.setattr(Qemu, "cont", cont)
    with pytest.raises(VmmError):
        moving.move()
    monkeypatch.undo()
    assert not moving.guest.runs()
    assert settle(moving.old, moving.new) == result
    moving.guest.wait_runs()
    assert moving.old.lives() == (result == "old")
    assert moving.new.lives() == (result == "new")

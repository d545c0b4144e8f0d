"""Qemu drives a real QEMU; what does not answer as one is refused in a sentence."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Backend, Qemu
from tests.guests.firmware import SIZE, FirmwareGuest
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE

pytestmark = [pytest.mark.e2e, needs_qemu]


class World:
    """Memory, and the QEMUs that run a guest on it."""

    def __init__(self, directory: Path, ends: ExitStack) -> None:
        self.fd = os.memfd_create("ram")
        ends.callback(os.close, self.fd)
        os.ftruncate(self.fd, SIZE)
        self.guest = FirmwareGuest(directory, self.fd)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ends = ends

    def start(self, name: str, *more: str) -> Qemu:
        path = f"/proc/self/fd/{self.fd}"
        process = subprocess.Popen(self.guest.command(name, *more, memory=path), pass_fds=(self.fd,))
        self.processes[name] = process
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        qemu = Qemu(str(self.guest.qmp(name)), PATIENCE, wait=PATIENCE)
        self._ends.callback(qemu.close)
        return qemu


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with ExitStack() as ends:
        yield World(tmp_path, ends)


def test_a_state_is_saved_and_loaded(world: World, tmp_path: Path) -> None:
    """A guest goes on in another QEMU from a file with its state, once more through a pipe; its RAM stays in place."""
    first = world.start("first")
    world.guest.wait_runs()
    assert first.pid == world.processes["first"].pid
    assert first.version >= (4, 0, 0)
    first.stop()
    assert not world.guest.runs()
    allocated = os.fstat(world.fd).st_blocks
    with (tmp_path / "state").open("w+b") as state:
        assert first.save_state(state.fileno()) == os.fstat(state.fileno()).st_size > 1000
        state.seek(0)
        second = world.start("second", "-incoming", "defer")
        second.load_state(state.fileno())
    assert os.fstat(world.fd).st_blocks == allocated  # no hole was filled
    assert second.status() == "paused"
    second.cont()
    first.quit()
    assert world.processes["first"].wait() == 0
    world.guest.wait_runs()

    third = world.start("third", "-incoming", "defer")
    reader, writer = os.pipe()
    second.stop()
    third.begin_load(reader)
    second.save_state(writer)
    os.close(reader)
    os.close(writer)
    third.wait_loaded()
    third.cont()
    second.quit()
    world.guest.wait_runs()


def test_a_guest_goes_on_after_a_save(world: World, tmp_path: Path) -> None:
    """`cont` after a save; and a second save is possible."""
    qemu = world.start("first")
    assert qemu.capabilities(x_ignore_shared=True) == {"x_ignore_shared": False}
    for name in ("a", "b"):
        qemu.stop()
        with (tmp_path / name).open("wb") as state:
            qemu.save_state(state.fileno())
        qemu.cont()
        world.guest.wait_runs()


def test_backends(world: World) -> None:
    """The memory of a QEMU, as it was told."""
    qemu = world.start("first")
    path = f"/proc/self/fd/{world.fd}"
    assert qemu.backends() == [Backend("ram", "memory-backend-file", SIZE, True, path)]


def test_refusals_have_the_words_of_qemu(world: World, tmp_path: Path) -> None:
    """An error of QEMU is quoted, and the connection can be used afterwards."""
    qemu = world.start("first", "-S")  # the guest leaves QEMU no moment for a device_add
    with pytest.raises(VmmError, match="refuses 'device_add': 'nonsense' is not a valid device model name"):
        qemu.ask("device_add", {"driver": "nonsense"})
    with pytest.raises(VmmError, match="has no migration capability 'x-nonsense'"):
        qemu.capabilities(x_nonsense=True)
    with (tmp_path / "state").open("w+b") as state, pytest.raises(VmmError, match="refuses 'migrate-incoming'"):
        qemu.load_state(state.fileno())
    qemu.cont()
    world.guest.wait_runs()
    world.processes["first"].kill()
    with pytest.raises(VmmError, match="has ended or closed the connection"):
        qemu.status()


def test_a_state_that_does_not_fit(world: World, tmp_path: Path) -> None:
    """A QEMU that cannot load a state has ended."""
    (tmp_path / "state").write_bytes(b"nonsense" * 1000)
    qemu = world.start("first", "-incoming", "defer")
    with (tmp_path / "state").open("rb") as state, pytest.raises(VmmError):
        qemu.load_state(state.fileno())
    assert world.processes["first"].wait(PATIENCE) == 1

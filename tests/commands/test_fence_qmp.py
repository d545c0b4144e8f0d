"""Fences by a real QEMU's QMP: its guest stands still, and goes on only if it was running."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.commands.fences import choose, recover
from gmemd.commands.fencing import held
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError
from gmemd.processes.identity import start_time
from gmemd.vmm.qemu import Qemu
from tests.commands.live import LiveMachine
from tests.commands.test_fences import state
from tests.guests.firmware import SIZE, FirmwareGuest
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE, wait_for

pytestmark = [pytest.mark.e2e, needs_qemu]


class World(LiveMachine):
    """A gmemd with the object `m`, and a QEMU that runs a guest on it."""

    guest: FirmwareGuest
    vmm: subprocess.Popen[bytes]

    async def start(self, directory: Path) -> None:
        await self.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
        fd = self.gmemd.objects.find("m").fd
        self.guest = FirmwareGuest(directory, fd, "m")
        self.vmm = subprocess.Popen(
            self.guest.command("q", "-qmp", f"unix:{directory}/second,server=on,wait=off",
                               memory=f"/proc/self/fd/{fd}"), pass_fds=(fd,))
        Qemu(self.path, PATIENCE, wait=PATIENCE).close()
        self.guest.wait_runs()

    @property
    def path(self) -> str:
        return str(self.guest.qmp("q"))

    def second(self) -> Qemu:
        """Another monitor of it, as others use."""
        return Qemu(str(self.guest.directory / "second"), PATIENCE)

    def fence(self, **more: Any) -> Qmp:
        fence = choose(self.gmemd, self, self.gmemd.objects.find("m"), {"via": "qmp", "qmp": self.path, **more})
        assert isinstance(fence, Qmp)
        return fence


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World()
    try:
        await made.start(tmp_path)
        yield made
    finally:
        made.vmm.kill()
        made.vmm.wait()
        made.guest.memory.close()
        await made.close()


async def test_a_guest_stands_still(world: World, tmp_path: Path) -> None:
    """It goes on afterwards, also after its device state was saved; with auto and a path it is the same fence."""
    fence = world.fence()
    with (tmp_path / "state").open("w+b") as file:
        async with held(fence):
            assert not world.guest.runs()
            assert fence.vmm.startswith("QEMU ")
            assert await fence.save_state(file.fileno()) == os.fstat(file.fileno()).st_size > 1000
            assert not world.guest.runs()
    world.guest.wait_runs()
    auto = choose(world.gmemd, world, world.gmemd.objects.find("m"), {"qmp": world.path})
    async with held(auto):
        assert auto.via == "qmp"
        assert not world.guest.runs()
    world.guest.wait_runs()


async def test_a_stopped_guest_stays_so(world: World) -> None:
    """Only what gmemd has stopped goes on."""
    with world.second() as other:
        other.stop()
        async with held(world.fence()):
            pass
        assert other.status() == "paused"


async def test_a_guest_that_others_continue_is_noticed(world: World) -> None:
    """Even if it stands still again: what was copied is of no moment."""
    fence = world.fence()
    await fence.hold()
    with world.second() as other:
        other.cont()
        world.guest.wait_runs()
        other.stop()
        with pytest.raises(QmpError, match="was continued by somebody else"):
            await fence.release()
        assert other.status() == "running"


async def test_a_vmm_that_ends_has_written_nothing_more(world: World) -> None:
    async with held(world.fence()):
        world.vmm.kill()
        world.vmm.wait()


async def test_others_that_hold_the_memory_are_frozen(world: World) -> None:
    """Those behind vhost-user devices, for example, which go on while the device state is saved."""
    fd = world.gmemd.objects.find("m").fd
    with subprocess.Popen(["sleep", "1000"], pass_fds=(fd,)) as other:
        fence = world.fence()
        async with held(fence):
            assert state(other.pid) == "T"
            assert state(world.vmm.pid) != "T"
            with open(os.devnull, "wb") as nowhere:
                await fence.save_state(nowhere.fileno())
            assert state(other.pid) == "T"
        wait_for(lambda: state(other.pid) != "T")
        world.guest.wait_runs()
        other.kill()


async def test_the_deadline_continues_the_guest(world: World) -> None:
    fence = world.fence(deadline=2000)
    await fence.hold()
    async with asyncio.timeout(PATIENCE):
        while not world.guest.runs():
            await asyncio.sleep(0)
    with pytest.raises(QmpError, match="the deadline of 2000 ms has passed"):
        await fence.release()


async def test_a_silent_vmm_is_refused(world: World) -> None:
    """One that hangs: the deadline applies, and nothing is left; it goes on when it can."""
    world.vmm.send_signal(signal.SIGSTOP)
    fence = world.fence(deadline=300)
    with pytest.raises(QmpError, match="does not answer"):
        await fence.hold()
    world.vmm.send_signal(signal.SIGCONT)
    world.guest.wait_runs()
    assert world.gmemd.objects.find("m").fence is None


async def test_another_vmm_is_refused(world: World) -> None:
    """One that has nothing to do with the memory is not stopped."""
    await world.do("object-add", qom_type="memory-backend-memfd", id="n", size=4096)
    fence = choose(world.gmemd, world, world.gmemd.objects.find("n"), {"via": "qmp", "qmp": world.path})
    with pytest.raises(QmpError, match=rf"\(process {world.vmm.pid}\) does not share 'n'"):
        await fence.hold()
    world.guest.wait_runs()


async def test_a_crash_leaves_a_note(world: World) -> None:
    """The next daemon continues the guest that gmemd has stopped, and no other."""
    backend = world.gmemd.objects.find("m")
    fence = world.fence()
    await fence.hold()
    note = {**(backend.fence or {})}
    assert note["vmm"] == [world.vmm.pid, start_time(world.vmm.pid)]
    assert fence._qemu is not None
    fence._qemu.close()  # as the end of the daemon does
    backend.fence = {**note, "vmm": [world.vmm.pid, note["vmm"][1] + 1]}
    recover(world.gmemd)
    async with asyncio.timeout(PATIENCE):
        while backend.fence is not None:
            await asyncio.sleep(0.001)
    assert not world.guest.runs()
    backend.fence = note
    recover(world.gmemd)
    async with asyncio.timeout(PATIENCE):
        while backend.fence is not None:
            await asyncio.sleep(0.001)
    world.guest.wait_runs()
    with pytest.raises(QmpError):
        await fence.release()


async def test_a_tenant_stops_its_own_guest_only(world: World) -> None:
    """A guest that another user runs on its memory goes on."""
    room = copy(world.gmemd)
    room.sees_all, room.tenant = False, str(os.getuid() + 1)
    asked = {"via": "qmp", "qmp": world.path}
    with pytest.raises(QmpError, match=f"^process {world.vmm.pid}, which is another user's, holds the memory of 'm'$"):
        await choose(room, world, world.gmemd.objects.find("m"), asked).hold()
    assert world.guest.runs()
    room.tenant = str(os.getuid())
    async with held(choose(room, world, world.gmemd.objects.find("m"), asked)):
        assert not world.guest.runs()

"""A device state without the memory: saved beside the object, and handed out only as long as it fits that."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.changes.change import WithFds
from tests.commands.live import LiveMachine
from tests.commands.test_snapshots import PAGE, one, write

SIZE = 64 * PAGE
STATE = b"the state of the devices" * 100


@pytest.fixture
async def live(tmp_path: Path) -> AsyncIterator[LiveMachine]:
    machine = LiveMachine(snapshots=str(tmp_path / "snapshots"))
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    write(machine, "m", b"words", PAGE)
    with (tmp_path / "state").open("w+b") as state:
        state.write(STATE)
        state.flush()
        machine.named_fds.receive("state", os.dup(state.fileno()))
        yield machine
    assert machine.gmemd.snapshots._uses == {}
    await machine.close()


def given(**more: Any) -> dict[str, Any]:
    return {"id": "m", "state": {"fdname": "state", "vmm": "QEMU 7.2.22"}, **more}


async def test_it_is_a_checkpoint_whose_memory_is_the_object(live: LiveMachine) -> None:
    """It has the next number of the object, and no copy of the memory."""
    assert await live.do("memdev-snapshot", **given()) == {"name": "m@1"}
    found = await one(live, "m@1")
    assert (found["stored"], found["via"], found["consistent"]) == ("object", "qmp", True)
    assert found["device-state"] == {"bytes": len(STATE), "vmm": "QEMU 7.2.22"}
    assert found["bytes"] < 32 * PAGE
    [status] = await live.do("query-memdev-status", id="m")
    assert status["checkpoints"] == 1
    handed = await live.do("memdev-get-snapshot", name="m@1", part="device-state")
    assert isinstance(handed, WithFds)
    assert os.pread(handed.fds[0], 1 << 20, 0) == STATE
    for fd in handed.fds:
        os.close(fd)
    assert await live.do("memdev-snapshot-verify", name="m@1") == {}
    assert "m@1" in await live.refused("memdev-restore", name="m@1", id="other")


async def test_a_stale_state_is_refused(live: LiveMachine) -> None:
    """Once a guest has begun to run on the memory, unless nobody could write it."""
    await live.do("memdev-snapshot", **given())
    backend = live.gmemd.objects.find("m")
    backend.generation += 1
    assert await live.refused("memdev-get-snapshot", name="m@1", part="device-state") == \
        "the device state of 'm@1' no longer fits: a guest has run on 'm' since"
    backend.generation -= 1
    await live.do("memdev-freeze", id="m")
    backend.generation += 1
    for fd in (await live.do("memdev-get-snapshot", name="m@1", part="device-state")).fds:
        os.close(fd)


async def test_a_state_without_its_memory_is_refused(live: LiveMachine) -> None:
    """Also when another object has that id now."""
    await live.do("memdev-snapshot", **given())
    words = "the device state of 'm@1' belongs to the memory of object 'm', which is gone"
    await live.do("object-del", id="m")
    assert await live.refused("memdev-get-snapshot", name="m@1", part="device-state") == words
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    assert await live.refused("memdev-get-snapshot", name="m@1", part="device-state") == words


@pytest.mark.parametrize(("more", "words"), [
    ({"device_state": True, "fence": {"via": "qmp", "qmp": "/x"}}, "parameter 'device-state' does not go with 'state'"),
    ({"live": True}, "parameter 'live' does not go with 'state'"),
    ({"parent": "one"}, "parameter 'parent' does not go with 'state'"),
    ({"state": {"fdname": "nothing", "vmm": "QEMU"}}, "nothing"),
])
async def test_what_does_not_go_together_is_refused(live: LiveMachine, more: dict[str, Any], words: str) -> None:
    assert words in await live.refused("memdev-snapshot", **given(**more))
    assert await live.do("memdev-snapshot", **given()) == {"name": "m@1"}


async def test_only_a_vmm_sends_memory(live: LiveMachine) -> None:
    """`migrate` is for checkpoints by a VMM, of memory that is not private in part."""
    assert await live.refused("memdev-snapshot", id="m", migrate=True) == "parameter 'migrate' needs 'device-state'"
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    assert await live.refused("memdev-snapshot", id="g", migrate=True, device_state=True,
                              fence={"via": "qmp", "qmp": "/x"}) == \
        "object 'g' can be private in part, which a VMM does not send"

"""A real second process that hands its userfaultfd over: private pages are SIGBUS and EFAULT there."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.commands.guest import Guest, hand_over
from tests.commands.live import LiveMachine
from tests.patience import PATIENCE

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    """A machine with the guest_memfd `g`, shared, of which a third page has content."""
    machine = LiveMachine("simulated:in-place")
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    os.pwrite(fd_of(machine), b"s", 2 * PAGE)
    yield machine
    await machine.close()


def fd_of(machine: LiveMachine) -> int:
    return machine.gmemd.objects.find("g").fd


async def convert(machine: LiveMachine, first: int, count: int, to: str, preserve: bool = False) -> None:
    await machine.do("memdev-convert", id="g", offset=first * PAGE, size=count * PAGE, to=to, preserve=preserve)


async def test_private_pages_fault(live: LiveMachine) -> None:
    """EFAULT in a system call, SIGBUS at a touch; neighbours and converted pages read what they should.

    Items 62 to 67 of the checklist, as a process that cooperates meets them.
    """
    await convert(live, 0, 2, "private")
    with Guest(fd_of(live), SIZE) as guest:
        await hand_over(live, guest)
        await live.do("memdev-enforce", id="g", fdname="u", address=guest.address)
        assert [guest.ask("call", page * PAGE) for page in range(8)] \
            == ["EFAULT", "EFAULT", "115", "0", "0", "0", "0", "0"]
        await convert(live, 1, 1, "shared")
        assert [guest.ask("call", page * PAGE) for page in range(3)] == ["EFAULT", "0", "115"]
        await convert(live, 2, 1, "private", preserve=True)
        assert [guest.ask("call", page * PAGE) for page in range(4)] == ["EFAULT", "0", "EFAULT", "0"]
        await convert(live, 0, 8, "shared", preserve=True)
        assert [guest.ask("touch", page * PAGE) for page in range(4)] == ["0", "0", "115", "0"]
        await convert(live, 3, 1, "private")
        assert guest.ask("touch", 3 * PAGE) == ""
        assert guest.process.wait(PATIENCE) == -signal.SIGBUS


async def test_a_discarded_page_is_shared_still(live: LiveMachine) -> None:
    """It reads as zeros and does not fault."""
    with Guest(fd_of(live), SIZE) as guest:
        await hand_over(live, guest)
        await live.do("memdev-enforce", id="g", fdname="u", address=guest.address)
        await live.do("memdev-discard", id="g", offset=0, size=SIZE)
        assert guest.ask("touch", 2 * PAGE) == "0"


async def test_pages_that_a_holder_made_do_not_stay(live: LiveMachine) -> None:
    """A private page that was touched before the handover faults like any other."""
    await convert(live, 0, 1, "private")
    with Guest(fd_of(live), SIZE) as guest:
        assert guest.ask("put", 0) == "ok"
        await hand_over(live, guest)
        await live.do("memdev-enforce", id="g", fdname="u", address=guest.address)
        assert guest.ask("call", 0) == "EFAULT"
        await convert(live, 0, 1, "shared")
        assert guest.ask("call", 0) == "0"


async def test_it_ends_with_the_process(live: LiveMachine) -> None:
    """Nothing of it is left, and shared memory need not be all there any more."""
    with Guest(fd_of(live), SIZE) as guest:
        await hand_over(live, guest)
        await live.do("memdev-enforce", id="g", fdname="u", address=guest.address)
        assert await live.do("query-memdev-enforcers") \
            == [{"id": "g", "pid": guest.process.pid, "address": guest.address}]
    async with asyncio.timeout(10):
        while await live.do("query-memdev-enforcers"):
            await asyncio.sleep(0)
    await live.do("memdev-discard", id="g", offset=0, size=SIZE)
    assert live.gmemd.kernel.resident(fd_of(live)) == 0


async def test_what_is_refused(live: LiveMachine) -> None:
    """No userfaultfd, one without the feature, another address; the descriptor keeps its name."""
    live.sent = [os.memfd_create("no")]
    await live.do("getfd", fdname="no")
    assert await live.refused("memdev-enforce", id="g", fdname="no", address=0) \
        == "the descriptor 'no' is not a userfaultfd with UFFD_FEATURE_SIGBUS"
    with Guest(fd_of(live), SIZE, features=0) as guest:
        await hand_over(live, guest)
        assert "is not a userfaultfd" in await live.refused("memdev-enforce", id="g", fdname="u", address=guest.address)
        await live.do("closefd", fdname="u")
    with Guest(fd_of(live), SIZE) as guest:
        await hand_over(live, guest)
        assert await live.refused("memdev-enforce", id="g", fdname="u", address=guest.address + PAGE) \
            == f"object 'g' is not mapped as a whole at {guest.address + PAGE:#x} in process {guest.process.pid}"
        await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
        assert await live.refused("memdev-enforce", id="m", fdname="u", address=guest.address) \
            == "object 'm' is not a guest_memfd"
        await live.do("memdev-enforce", id="g", fdname="u", address=guest.address)


@pytest.mark.kvm
async def test_a_real_guest_memfd_is_not_for_it() -> None:
    """Its private pages fault by its own kernel, or not at all."""
    machine = LiveMachine("kvm")
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    assert "is a real guest_memfd" in await machine.refused("memdev-enforce", id="g", fdname="u", address=0)
    await machine.close()

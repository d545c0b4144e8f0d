"""Items 62 to 69 of the guest_memfd checklist over the simulated profile `in-place`.

No released kernel converts pages for a VM of the default type. What a process meets is shown by one that
cooperates (memdev-enforce), where a real guest_memfd would do the same to every process.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest_asyncio

from gmemd.commands import lab
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.lab import Lab, LabKernel
from gmemd.schema.validate import Schema
from tests.commands.guest import Guest, hand_over
from tests.commands.live import LiveMachine

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 6
SIZE = PAGES * PAGE
FAULT = "EFAULT"  # what SIGBUS is in a system call


class Checked(LiveMachine):
    """A machine of the profile `in-place` with the fault lab, an object `g` and a process that has it mapped."""

    def __init__(self) -> None:
        super().__init__("simulated:in-place")
        gmemd = self.gmemd
        gmemd.schema, gmemd.lab = Schema.load(lab=True), Lab()
        gmemd.kernel = LabKernel(gmemd.kernel, gmemd.lab)
        self.dispatcher = Dispatcher(gmemd, (*MODULES, lab))
        self.usable = self.dispatcher.usable(self.rights)
        self.guests: list[Guest] = []

    async def begin(self, *, shared: bool) -> Guest:
        """Make the object; the process that has it mapped, and cooperates."""
        await self.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE, init_shared=shared)
        guest = Guest(self.gmemd.objects.find("g").fd, SIZE)
        self.guests.append(guest)
        await hand_over(self, guest)
        await self.do("memdev-enforce", id="g", fdname="u", address=guest.address)
        return guest

    async def convert(self, first: int, count: int, to: str, *, preserve: bool = False) -> None:
        await self.do("memdev-convert", id="g", offset=first * PAGE, size=count * PAGE, to=to, preserve=preserve)


@pytest_asyncio.fixture
async def made() -> AsyncIterator[Checked]:
    machine = Checked()
    yield machine
    for guest in machine.guests:
        guest.__exit__()
    await machine.close()


def seen(guest: Guest) -> list[str]:
    """What the process finds in the first byte of each page."""
    return [guest.ask("call", page * PAGE) for page in range(PAGES)]


def fill(guest: Guest, *pages: int) -> None:
    for page in pages:
        assert guest.ask("put", page * PAGE) == "ok"


async def test_62_begins_private(made: Checked) -> None:
    """A file that begins private faults everywhere until it is converted."""
    guest = await made.begin(shared=False)
    assert seen(guest) == [FAULT] * PAGES
    await made.convert(0, PAGES, "shared")
    assert seen(guest) == ["0"] * PAGES


async def test_63_to_shared_opens_exactly_the_range(made: Checked) -> None:
    guest = await made.begin(shared=False)
    await made.convert(2, 2, "shared")
    assert seen(guest) == [FAULT, FAULT, "0", "0", FAULT, FAULT]


async def test_64_to_private_faults_again_in_existing_mappings(made: Checked) -> None:
    guest = await made.begin(shared=True)
    fill(guest, 3)
    await made.convert(3, 1, "private")
    assert seen(guest) == ["0", "0", "0", FAULT, "0", "0"]


async def test_65_neighbours_are_untouched(made: Checked) -> None:
    guest = await made.begin(shared=True)
    fill(guest, *range(PAGES))
    await made.convert(2, 2, "private")
    assert seen(guest) == ["77", "77", FAULT, FAULT, "77", "77"]
    await made.convert(2, 1, "shared")
    assert seen(guest) == ["77", "77", "0", FAULT, "77", "77"]


async def test_66_data_survives_only_when_asked_for(made: Checked) -> None:
    guest = await made.begin(shared=True)
    fill(guest, 0, 1, 2)
    await made.convert(0, 1, "private", preserve=True)
    await made.convert(1, 2, "private")
    await made.convert(0, 2, "shared", preserve=True)
    await made.convert(2, 1, "shared")
    assert seen(guest) == ["77", "0", "0", "0", "0", "0"]


async def test_67_converting_before_any_page_exists(made: Checked) -> None:
    await made.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    await made.convert(0, 4, "private")
    await made.convert(1, 1, "shared")
    assert made.gmemd.kernel.resident(made.gmemd.objects.find("g").fd) == 0
    assert (await made.do("query-memdev-ranges", id="g"))["private"] == 3 * PAGE


async def test_68_a_pinned_page_and_69_the_retry(made: Checked) -> None:
    """EAGAIN with the page's offset and nothing converted; after the unpin it succeeds."""
    guest = await made.begin(shared=True)
    fill(guest, 1, 4)
    await made.do("x-memdev-inject", operation="convert", offset=4 * PAGE)
    assert await made.refused("memdev-convert", id="g", offset=0, size=SIZE, to="private") \
        == f"cannot convert 'g': Resource temporarily unavailable at offset {4 * PAGE:#x}"
    assert seen(guest) == ["0", "77", "0", "0", "77", "0"]
    await made.convert(0, PAGES, "private")
    assert seen(guest) == [FAULT] * PAGES

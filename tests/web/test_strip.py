"""The picture of an object's pages, by literal cells and by real memory."""

from __future__ import annotations

import asyncio
import mmap
from time import perf_counter

from gmemd.changes.pace import TURN, Pace
from gmemd.commands.measure import Measurer, item_of
from gmemd.memory.cells import CELLS, Cell, cells_of, measure_cells
from gmemd.web.strip import paths
from tests.commands.conftest import Machine

PAGE = 4096


def test_equal_neighbours_are_drawn_as_one() -> None:
    """A path for each kind that occurs; y grows downwards, columns stand on 16."""
    cells: list[Cell] = [(0, 1, 0, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)]
    assert paths(cells) == {"shared": "M0 0h2v16h-2z", "private": "M2 0h1v16h-1z", "shared-absent": "M3 0h1v16h-1z"}


def test_parts_of_a_column_are_stacked() -> None:
    """From the bottom: private, shared, private and absent, shared and absent."""
    assert paths([(1, 1, 1, 1)]) == {"private": "M0 12h1v4h-1z", "shared": "M0 8h1v4h-1z",
                                     "private-absent": "M0 4h1v4h-1z", "shared-absent": "M0 0h1v4h-1z"}


def test_little_is_not_nothing() -> None:
    """One page among a million is seen, and the column stays as high as the others."""
    assert paths([(0, 1, 0, 999_999)]) == {"shared": "M0 15h1v1h-1z", "shared-absent": "M0 0h1v15h-1z"}


def test_cells_are_whole_pages() -> None:
    """A small object has a cell for each page, a large one at most CELLS."""
    small, large = cells_of(3 * PAGE, PAGE), cells_of(1000 * PAGE, PAGE)
    assert small == [(0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE)]
    assert len(large) <= CELLS
    assert sum(size for _, size in large) == 1000 * PAGE
    assert all(offset % PAGE == 0 for offset, _ in large)


def strip_of(machine: Machine, name: str) -> list[Cell]:
    return measure_cells(machine.gmemd.kernel, item_of(machine.gmemd.objects.find(name)))


def test_what_is_written_is_in_memory() -> None:
    """Cells tell resident from absent bytes, in their places."""
    machine = Machine()
    machine.run("object-add", qom_type="memory-backend-memfd", id="ram0", size=4 * PAGE)
    with mmap.mmap(machine.gmemd.objects.find("ram0").fd, 4 * PAGE) as memory:
        memory[2 * PAGE] = 1
    empty, full = (0, 0, 0, PAGE), (0, PAGE, 0, 0)
    assert strip_of(machine, "ram0") == [empty, empty, full, empty]
    machine.gmemd.close()


def test_private_pages_that_were_preserved_are_in_memory() -> None:
    """They are kept aside, and count as private where they belong; others became absent."""
    machine = Machine()
    machine.run("object-add", qom_type="memory-backend-guest-memfd", id="cvm0", size=4 * PAGE, prealloc=True)
    machine.run("memdev-convert", id="cvm0", offset=0, size=PAGE, to="private", preserve=True)
    machine.run("memdev-convert", id="cvm0", offset=PAGE, size=PAGE, to="private")
    shared = (0, PAGE, 0, 0)
    assert strip_of(machine, "cvm0") == [(PAGE, 0, 0, 0), (0, 0, PAGE, 0), shared, shared]
    machine.gmemd.close()


def test_many_ranges_in_a_cell_are_added_up() -> None:
    """Every second page of a large object is private: each cell is half and half."""
    machine = Machine()
    size = 64 * 32 * PAGE
    machine.run("object-add", qom_type="memory-backend-guest-memfd", id="cvm0", size=size, prealloc=True)
    for page in range(0, size, 2 * PAGE):
        machine.run("memdev-convert", id="cvm0", offset=page, size=PAGE, to="private")
    assert set(strip_of(machine, "cvm0")) == {(0, 16 * PAGE, 16 * PAGE, 0)}
    machine.gmemd.close()


def test_a_sweep_sums_up_all_objects() -> None:
    """Private and shared bytes of everything, also of many objects."""
    machine = Machine()
    for number in range(40):
        machine.run("object-add", qom_type="memory-backend-guest-memfd", id=f"o{number}", size=2 * PAGE, prealloc=True)
        machine.run("memdev-convert", id=f"o{number}", offset=0, size=PAGE, to="private", preserve=True)
    sweep = asyncio.run(Measurer(machine.gmemd).sweep(60))
    assert sweep is not None
    assert (sweep.usage.by_visibility, sweep.usage.unknown) == ({"private": 40 * PAGE, "shared": 40 * PAGE}, 0)
    machine.gmemd.close()


async def test_long_work_lets_others_go_first() -> None:
    """Work that keeps the pace is interrupted after a turn, short work is not."""
    turns = []

    async def work(long: bool) -> None:
        pace = Pace()
        for step in range(3):
            end = perf_counter() + (TURN if long else 0)
            while perf_counter() < end:
                pass
            turns.append((long, step))
            await pace.keep()

    await asyncio.gather(work(True), work(False))
    assert turns[0] == (True, 0)
    assert turns[-1] == (True, 2)

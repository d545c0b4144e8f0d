"""A guest_memfd against a byte-level model: more than 100,000 random operations, looked at after each one."""

from __future__ import annotations

import itertools
import mmap
import os
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError
from tests.commands.conftest import Machine

PAGE = os.sysconf("SC_PAGESIZE")
PAGES = 12
SIZE = PAGES * PAGE
BATCH = 250  # operations of one rule
WANTED = 100_000

done = 0  # operations in all


class GuestMemfd(RuleBasedStateMachine):
    """What every byte, page and range should be, next to what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine("simulated:in-place")

    @initialize(shared=st.booleans())
    def make(self, shared: bool) -> None:
        self.machine.run("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE, init_shared=shared)
        self.backend: HostMemoryBackend = self.machine.gmemd.objects.find("g")
        self.memory = mmap.mmap(self.backend.fd, SIZE)
        self.private = [not shared] * PAGES
        self.bytes = bytearray(SIZE)  # the shared view
        self.aside = bytearray(SIZE)  # private content that was preserved
        self.present: set[int] = set()  # pages of the shared view
        self.kept: set[int] = set()  # pages of what is aside
        self.events: list[dict[str, Any]] = []

    def teardown(self) -> None:
        self.memory.close()
        self.machine.gmemd.close()

    # -- single operations, for short counterexamples --------------------------------------------------

    PLACE = st.integers(0, PAGES - 1)
    COUNT = st.integers(1, PAGES)

    @rule(first=PLACE, count=COUNT, to=st.booleans(), preserve=st.booleans())
    def convert(self, first: int, count: int, to: bool, preserve: bool) -> None:
        """Private (`to` true) or shared; content goes aside and comes back only if preserved."""
        pages = range(first, min(PAGES, first + count))
        arguments = {"id": "g", "offset": first * PAGE, "size": len(pages) * PAGE,
                     "to": "private" if to else "shared"}
        result = self.machine.execute("memdev-convert", {**arguments, "preserve": preserve})
        changed = [page for page in pages if self.private[page] != to]
        assert result["converted"] == len(changed) * PAGE
        for page in changed:
            self._move(page, to, preserve)
        self.events.append(arguments)
        self._look()

    def _move(self, page: int, to: bool, preserve: bool) -> None:
        source, target = (self.bytes, self.aside) if to else (self.aside, self.bytes)
        there, where = (self.present, self.kept) if to else (self.kept, self.present)
        part = slice(page * PAGE, (page + 1) * PAGE)
        moved = bytes(source[part]) if preserve and page in there else None
        self.private[page] = to
        self.bytes[part] = self.aside[part] = bytes(PAGE)
        self.present.discard(page)
        self.kept.discard(page)
        if moved is not None:
            target[part] = moved
            where.add(page)

    @rule(at=st.integers(0, SIZE - 1), size=st.integers(1, 2 * PAGE), value=st.integers(1, 255))
    def write(self, at: int, size: int, value: int) -> None:
        """A holder writes, where the memory is shared: elsewhere a real one would fault."""
        end = min(SIZE, at + size)
        while at < end:
            page = at // PAGE
            until = min(end, (page + 1) * PAGE)
            if not self.private[page]:
                self.memory[at:until] = self.bytes[at:until] = bytes([value]) * (until - at)
                self.present.add(page)
            at = until
        self._look()

    @rule(first=PLACE, count=COUNT)
    def discard(self, first: int, count: int) -> None:
        """Zeros from then on, and no pages; private or shared it stays."""
        count = min(PAGES - first, count)
        self.machine.execute("memdev-discard", {"id": "g", "offset": first * PAGE, "size": count * PAGE})
        part = slice(first * PAGE, (first + count) * PAGE)
        self.bytes[part] = self.aside[part] = bytes(count * PAGE)
        self.present -= set(range(first, first + count))
        self.kept -= set(range(first, first + count))
        self._look()

    @rule()
    def preallocate(self) -> None:
        """Every page is there; no byte changes."""
        self.machine.execute("memdev-populate", {"id": "g"})
        self.present = set(range(PAGES))
        self._look()

    @rule(offset=st.integers(-1, SIZE + PAGE), size=st.integers(0, SIZE + PAGE))
    def refused(self, offset: int, size: int) -> None:
        """What is not a range of whole pages inside changes nothing."""
        if offset % PAGE == size % PAGE == 0 and 0 <= offset < offset + size <= SIZE:
            return
        with pytest.raises(QmpError):
            self.machine.execute("memdev-convert", {"id": "g", "offset": offset, "size": size, "to": "private"})
        self._look()

    @rule(seed=st.integers(0, 1 << 32))
    def many(self, seed: int) -> None:
        """A long run of all of them."""
        random = Random(seed)
        for _ in range(BATCH):
            choice = random.random()
            first, count = random.randrange(PAGES), min(random.randrange(1, PAGES), random.randrange(1, PAGES))
            if choice < 0.45:
                self.convert(first, count, random.random() < 0.5, random.random() < 0.5)
            elif choice < 0.8:
                self.write(random.randrange(SIZE), random.randrange(1, 2 * PAGE), random.randrange(1, 256))
            elif choice < 0.97:
                self.discard(first, count)
            elif choice < 0.996:
                self.refused(random.randrange(SIZE), random.randrange(1, SIZE))
            else:
                self.preallocate()

    # -- what must hold ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """After each operation: every byte, the sums, the events. Nothing of it allocates."""
        global done
        done += 1
        backend, kernel = self.backend, self.machine.gmemd.kernel
        assert os.pread(backend.fd, SIZE, 0) == self.bytes
        assert kernel.resident(backend.fd) == len(self.present) * PAGE
        if backend.aside is not None:
            assert os.pread(backend.aside.fd, SIZE, 0) == self.aside
            assert kernel.resident(backend.aside.fd) == len(self.kept) * PAGE
        assert len(self.machine.events) == len(self.events)

    @invariant()
    def ranges_are_as_they_should_be(self) -> None:
        """The map covers every page once, neighbours differ, and the kernel has exactly the pages it should."""
        machine = self.machine
        listed = machine.run("query-memdev-ranges", id="g")
        flat = [entry["visibility"] == "private" for entry in listed["ranges"] for _ in range(entry["size"] // PAGE)]
        assert flat == self.private
        assert listed["private"] == sum(self.private) * PAGE
        states = [entry["visibility"] for entry in listed["ranges"]]
        assert all(one != other for one, other in itertools.pairwise(states))
        pages = {page for offset, size in machine.gmemd.kernel.resident_ranges(self.backend.fd, 0, SIZE)
                 for page in range(offset // PAGE, (offset + size) // PAGE)}
        assert pages == self.present
        assert machine.events == [("MEMDEV_CONVERTED", event) for event in self.events]
        machine.events.clear()
        self.events.clear()


def test_every_byte_is_what_it_should_be() -> None:
    """More than 100,000 operations: no byte is both private and shared, events complete, pages as the kernel says."""
    run_state_machine_as_test(GuestMemfd, settings=settings(
        max_examples=20, stateful_step_count=25, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck)))
    if done < WANTED:
        model = GuestMemfd()
        model.make(shared=True)
        seed = 0
        while done < WANTED:
            model.many(seed)
            model.ranges_are_as_they_should_be()
            seed += 1
        model.teardown()
    assert done >= WANTED

"""Private and shared memory, and discarding, on both kernels."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest

from gmemd.kernel.choose import choose_kernel
from tests.commands.conftest import Machine

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE


@pytest.fixture(params=["simulated", "simulated:in-place", pytest.param("kvm", marks=pytest.mark.kvm)])
def lab(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(request.param)
    machine.run("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    yield machine
    machine.gmemd.close()


def view(machine: Machine) -> mmap.mmap:
    return mmap.mmap(machine.gmemd.objects.find("g").fd, SIZE)


def ranges(machine: Machine) -> list[tuple[int, int, str]]:
    listed = machine.run("query-memdev-ranges", id="g")["ranges"]
    return [(entry["offset"] // PAGE, entry["size"] // PAGE, entry["visibility"]) for entry in listed]


def test_begins_shared(lab: Machine) -> None:
    """An object begins shared, or private when it is asked to."""
    assert ranges(lab) == [(0, 8, "shared")]
    lab.run("object-add", qom_type="memory-backend-guest-memfd", id="p", size=SIZE, init_shared=False)
    assert lab.run("query-memdev-ranges", id="p")["private"] == SIZE


def test_private_bytes_leave_the_shared_view(lab: Machine) -> None:
    """Conversion to private zeroes exactly the range in what holders see, and its neighbours are untouched."""
    with view(lab) as memory:
        memory[:] = b"x" * SIZE
        assert lab.run("memdev-convert", id="g", offset=PAGE, size=2 * PAGE, to="private")["converted"] == 2 * PAGE
        assert memory[:] == b"x" * PAGE + bytes(2 * PAGE) + b"x" * 5 * PAGE
    assert ranges(lab) == [(0, 1, "shared"), (1, 2, "private"), (3, 5, "shared")]
    assert lab.events == [("MEMDEV_CONVERTED", {"id": "g", "offset": PAGE, "size": 2 * PAGE, "to": "private"})]


@pytest.mark.parametrize("preserve", [False, True])
def test_content_survives_only_when_asked_for(lab: Machine, preserve: bool) -> None:
    """There and back: with preserve the bytes come back, without they are zero."""
    with view(lab) as memory:
        memory[PAGE:2 * PAGE] = b"y" * PAGE
        for to in ("private", "shared"):
            lab.run("memdev-convert", id="g", offset=0, size=SIZE, to=to, preserve=preserve)
        assert memory[PAGE:2 * PAGE] == (b"y" * PAGE if preserve else bytes(PAGE))
    assert ranges(lab) == [(0, 8, "shared")]


def test_converting_again_changes_nothing(lab: Machine) -> None:
    """What already is what it shall be keeps its content."""
    with view(lab) as memory:
        memory[:3] = b"abc"
        assert lab.run("memdev-convert", id="g", offset=0, size=SIZE, to="shared")["converted"] == 0
        assert memory[:3] == b"abc"


@pytest.mark.parametrize(("offset", "size", "reason"), [
    (1, PAGE, "Invalid argument"), (0, 1, "Invalid argument"), (0, 0, "Invalid argument"),
    (SIZE, PAGE, "Invalid argument"), (0, SIZE + PAGE, "Invalid argument"), (-PAGE, PAGE, "Invalid argument"),
    ((1 << 63) - PAGE, PAGE, "File too large"),
])
@pytest.mark.parametrize("command", ["memdev-convert", "memdev-discard"])
def test_wrong_ranges_are_refused(lab: Machine, command: str, offset: int, size: int, reason: str) -> None:
    """Unaligned, empty, overflowing or outside: refused, nothing changes, and the right range then works."""
    to = {"to": "private"} if command == "memdev-convert" else {}
    _, desc = lab.refusal(command, id="g", offset=offset, size=size, **to)
    assert desc.startswith("offset ") or "expects" in desc
    assert ranges(lab) == [(0, 8, "shared")]
    lab.run(command, id="g", offset=0, size=PAGE, **to)


def test_only_guest_memfd_converts(lab: Machine) -> None:
    """Other memory has no visibility."""
    lab.run("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    no = ("GenericError", "object 'm' is not a guest_memfd")
    assert lab.refusal("memdev-convert", id="m", offset=0, size=PAGE, to="private") == no
    assert lab.refusal("query-memdev-ranges", id="m") == no


def test_discard_gives_pages_back(lab: Machine) -> None:
    """memdev-discard frees exactly the range, which then reads as zeros."""
    with view(lab) as memory:
        memory[:] = b"z" * SIZE
        assert lab.run("memdev-discard", id="g", offset=0, size=4 * PAGE) == {}
        assert lab.run("query-memdev-status", id="g")[0]["resident"] == 4 * PAGE
        assert memory[:] == bytes(4 * PAGE) + b"z" * 4 * PAGE


def test_answers_say_what_is_simulated(lab: Machine) -> None:
    """Without a kernel that converts, every answer says that it is simulated."""
    kernel = lab.gmemd.kernel
    simulated = not (kernel.name == "kvm" and kernel.conversion)
    assert lab.run("query-memdev-ranges", id="g")["simulated"] is simulated
    assert lab.run("memdev-convert", id="g", offset=0, size=PAGE, to="private")["simulated"] is simulated


def test_first_guest_memfd_cannot_be_mapped() -> None:
    """Of the 6.12 profile an object can be made, not mapped; the flags of 6.18 are refused in QEMU's words."""
    assert choose_kernel("simulated:6.12").guest_memfd_flags == 0
    machine = Machine("simulated:6.12")
    assert machine.refusal("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE, guest_memfd="on") == (
        "GenericError", "Current KVM instance does not support guest-memfd flag: 0x3")
    assert machine.run("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE, mmap=False) == {}
    machine.gmemd.close()

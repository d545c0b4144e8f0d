"""The checklist as questions: what a kernel answers to each item, put alike to a real kernel and to the simulation.

An answer is a value for JSON: an errno's name, "OK", a number, or what was seen. Sizes and offsets are in pages. With
a real kernel (`Bare`) the system calls answer; with the simulation, gmemd's rules do. Where a file cannot be created
in the way that a question needs, that is the answer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.linux import LinuxKernel, open_vm
from gmemd.kernel.probe import name_of, outcome
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel import host
from tests.kernel.host import look, mapped, signal_of

MMAP = uapi.GUEST_MEMFD_FLAG_MMAP
SHARED = uapi.GUEST_MEMFD_SHARED
FLAVOURS = (0, MMAP, SHARED)
PMD = 2 << 20

Answer = dict[str, Any]
Question = Callable[[Kernel], Answer]

ASKED: dict[tuple[int, ...], Question] = {}  # what both kernels are asked
ASKED_OF_LINUX: dict[tuple[int, ...], Question] = {}  # what a stand-in cannot show


class Bare(LinuxKernel):
    """Linux with whatever guest_memfd it has, no rule of gmemd's in front of its system calls."""

    def __init__(self) -> None:
        self.device, self.vm = open_vm("/dev/kvm")
        known = self._extension("GUEST_MEMFD", of_device=True)
        self.guest_memfd_flags = self._extension("GUEST_MEMFD_FLAGS") if known else None

    def allocate(self, fd: int, offset: int, size: int) -> None:
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE, offset, size)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, offset, size)


def asks(*items: int, of: dict[tuple[int, ...], Question] = ASKED) -> Callable[[Question], Question]:
    """The function asks for these items of the checklist."""

    def note(question: Question) -> Question:
        of[items] = question
        return question

    return note


def ask(kernel: Kernel, question: Question) -> Answer:
    """The answer, which may be that a file of the needed kind cannot be created."""
    try:
        return question(kernel)
    except OSError as exc:
        return {"file": name_of(exc)}


@contextmanager
def file(kernel: Kernel, pages: int = 4, flags: int = SHARED, *, size: int = 0) -> Iterator[int]:
    """A guest_memfd during the block."""
    fd = kernel.create_guest_memfd(size or pages * PAGE_SIZE, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def memory(kernel: Kernel, pages: int = 4, *, size: int = 0) -> Iterator[tuple[int, int]]:
    """A shared guest_memfd and where it is mapped."""
    with file(kernel, pages, size=size) as fd, mapped(fd, size or pages * PAGE_SIZE) as address:
        yield fd, address


def alike(calls: Iterator[Callable[[], Any]]) -> str:
    """How these calls end, each way once."""
    return ", ".join(sorted({outcome(call) for call in calls}))


def of_each_flavour(answer: Callable[..., Answer]) -> Question:
    """The same question for files without flags, with MMAP, and with INIT_SHARED too."""

    def asked(kernel: Kernel) -> Answer:
        return {f"flags={flags}": ask(kernel, partial(answer, flags=flags)) for flags in FLAVOURS}

    return asked


def ended(call: Callable[[], Any]) -> str:
    """The name of the signal that a touch ends a process with."""
    number = signal_of(call)
    return signal.Signals(number).name if number else "OK"


def create(kernel: Kernel, size: int, flags: int) -> str:
    return outcome(lambda: os.close(kernel.create_guest_memfd(size, flags)))


# ---- creation, mapping -------------------------------------------------------------------------------------


@asks(1, 2)
def _flags(kernel: Kernel) -> Answer:
    return {f"flags={flags}": create(kernel, PAGE_SIZE, flags) for flags in range(4)}


@asks(3)
def _other_flags(kernel: Kernel) -> Answer:
    makers = [partial(kernel.create_guest_memfd, PAGE_SIZE, more | 1 << bit)
              for bit in range(2, 64) for more in (0, SHARED)]
    return {"bits 2 to 63": alike(iter(makers))}


@asks(4)
def _mask(kernel: Kernel) -> Answer:
    return {"flags": kernel.guest_memfd_flags}


@asks(5, 6, 8, 9)
@of_each_flavour
def _files(kernel: Kernel, flags: int) -> Answer:
    with file(kernel, 1, flags) as one, file(kernel, 4, flags) as two:
        seen = [os.fstat(fd) for fd in (one, two)]
    return {"pages": [stat.st_size // PAGE_SIZE for stat in seen], "own inodes": seen[0].st_ino != seen[1].st_ino,
            "block": [stat.st_blksize // PAGE_SIZE for stat in seen], "mode": f"{seen[0].st_mode & 0o7777:o}"}


@asks(7)
@of_each_flavour
def _sizes(kernel: Kernel, flags: int) -> Answer:
    sizes = {"below a page": range(PAGE_SIZE), "a page and a byte": [PAGE_SIZE + 1],
             "2^63 and more": [1 << 63, (1 << 64) - PAGE_SIZE], "below 2^63": [(1 << 63) - PAGE_SIZE]}
    return {name: ", ".join(sorted({create(kernel, size, flags) for size in some})) for name, some in sizes.items()}


@asks(10, 11, 12, 13, of=ASKED_OF_LINUX)
@of_each_flavour
def _bytes(kernel: Kernel, flags: int) -> Answer:
    with file(kernel, 1, flags) as fd:
        return {"read": outcome(lambda: os.read(fd, 1)), "write": outcome(lambda: os.write(fd, b"x")),
                "pread": outcome(lambda: os.pread(fd, 1, 0)), "pwrite": outcome(lambda: os.pwrite(fd, b"x", 0))}


@asks(14, 15, 16)
@of_each_flavour
def _mappings(kernel: Kernel, flags: int) -> Answer:
    with file(kernel, 4, flags) as fd:
        return {f"{kind}, {pages} pages": outcome(partial(kernel.try_map, fd, pages * PAGE_SIZE, reserve=True,
                                                          shared=kind == "shared"))
                for kind in ("shared", "private") for pages in (1, 4)}


@asks(17, 18, of=ASKED_OF_LINUX)
def _private_pages(kernel: Kernel) -> Answer:
    with file(kernel, 1, MMAP) as fd, mapped(fd, PAGE_SIZE) as address:
        advise = partial(host.madvise, address, PAGE_SIZE)
        return {"write": ended(lambda: host.fill(address, 1, 1)), "read": ended(lambda: look(address)),
                "populate to read": outcome(lambda: advise(uapi.MADV_POPULATE_READ)),
                "populate to write": outcome(lambda: advise(uapi.MADV_POPULATE_WRITE))}


@asks(19, 20, 21, 22)
def _contents(kernel: Kernel) -> Answer:
    with memory(kernel) as (fd, address):
        host.fill(address, 0xAA, 4 * PAGE_SIZE)
        filled = contents(address, 4)
        kernel.punch_hole(fd, 0, PAGE_SIZE)
        punched = contents(address, 4)
        host.fill(address, 0xBB, PAGE_SIZE)
        return {"filled": filled, "first page punched": punched, "filled again": contents(address, 4)}


def contents(address: int, pages: int) -> list[str]:
    """Which bytes each page has, in hex."""
    return [bytes(sorted(set(look(address + page * PAGE_SIZE, PAGE_SIZE)))).hex() for page in range(pages)]


@asks(23, 24, 25)
def _past_the_end(kernel: Kernel) -> Answer:
    with file(kernel, 1) as fd, mapped(fd, 4 * PAGE_SIZE) as address:
        return {"write": ended(lambda: host.fill(address, 0xAA, 4 * PAGE_SIZE)),
                "read": ended(lambda: look(address + PAGE_SIZE)), "inside": contents(address, 1)}


@asks(26, 27)
def _huge_advice(kernel: Kernel) -> Answer:
    private = uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS | uapi.MAP_NORESERVE
    with file(kernel, size=PMD) as fd, syscalls.mapped(2 * PMD, uapi.PROT_NONE, private, -1) as room:
        aligned = -(-room // PMD) * PMD
        host.map_over(aligned, PMD, fd)
        return {"HUGEPAGE": outcome(partial(host.madvise, aligned, PMD, host.MADV_HUGEPAGE)),
                "a touch": ended(lambda: host.fill(aligned, 0xAA, PMD))}


@asks(28, of=ASKED_OF_LINUX)
def _collapse(kernel: Kernel) -> Answer:
    with memory(kernel, size=PMD) as (_, address):
        host.fill(address, 0xAA, PMD)
        return {"COLLAPSE": outcome(partial(host.madvise, address, PMD, host.MADV_COLLAPSE)),
                "contents": contents(address, 1)}


@asks(29)
def _dontneed(kernel: Kernel) -> Answer:
    with memory(kernel, 1) as (_, address):
        host.fill(address, 0xAA, PAGE_SIZE)
        return {"DONTNEED": outcome(partial(host.madvise, address, PAGE_SIZE, mmap.MADV_DONTNEED)),
                "contents": contents(address, 1)}


@asks(30)
def _placement(kernel: Kernel) -> Answer:
    """Of pages that gmemd populates, on the last node that has memory."""
    node = host.online_nodes()[-1]
    with memory(kernel) as (fd, address):
        kernel.set_policy(fd, 4 * PAGE_SIZE, "bind", [node])
        kernel.populate(fd, 0, 4 * PAGE_SIZE, 1, policy="bind", nodes=[node])
        look(address)
        return {"on the node": host.node_of(address) == node}


@asks(31)
@of_each_flavour
def _policies(kernel: Kernel, flags: int) -> Answer:
    node = host.online_nodes()[-1]
    with file(kernel, 1, flags) as fd:
        kernel.try_map(fd, PAGE_SIZE, reserve=True)
        with mapped(fd, PAGE_SIZE) as address:
            modes = {"interleave": (uapi.MPOL_INTERLEAVE, [node]), "bind": (uapi.MPOL_BIND, [node]),
                     "default": (uapi.MPOL_DEFAULT, [])}
            return {**{name: _reads_back(address, *policy) for name, policy in modes.items()},
                    "unknown": outcome(partial(syscalls.mbind, address, PAGE_SIZE, 999, [node]))}


def _reads_back(address: int, mode: int, nodes: list[int]) -> bool:
    syscalls.mbind(address, PAGE_SIZE, mode, nodes)
    return syscalls.get_mempolicy(address) == (mode, nodes)


@asks(32, 33, 34)
@of_each_flavour
def _allocation(kernel: Kernel, flags: int) -> Answer:
    ranges = {"all": (0, 4), "at the end": (4, 1), "past the end": (5, 1), "over the end": (0, 5)}
    with file(kernel, 4, flags) as fd:
        answer: Answer = {name: outcome(partial(kernel.allocate, fd, offset * PAGE_SIZE, size * PAGE_SIZE))
                          for name, (offset, size) in ranges.items()}
        return answer | {"pages": [os.fstat(fd).st_size // PAGE_SIZE, kernel.resident(fd) // PAGE_SIZE]}


@asks(35, 36, 37)
@of_each_flavour
def _unaligned(kernel: Kernel, flags: int) -> Answer:
    ranges = [(PAGE_SIZE - 1, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE - 1)]
    ranges += [(offset, size) for offset in (0, 1, PAGE_SIZE) for size in (1, PAGE_SIZE - 1, PAGE_SIZE + 1)]
    with file(kernel, 4, flags) as fd:
        kernel.allocate(fd, 0, 4 * PAGE_SIZE)
        return {"punch": alike(partial(kernel.punch_hole, fd, *part) for part in ranges),
                "allocate": alike(partial(kernel.allocate, fd, *part) for part in ranges),
                "pages": kernel.resident(fd) // PAGE_SIZE}


@asks(38, 39, 40, 41)
@of_each_flavour
def _holes(kernel: Kernel, flags: int) -> Answer:
    with file(kernel, 4, flags) as fd:
        kernel.allocate(fd, 0, 4 * PAGE_SIZE)
        past = [outcome(partial(kernel.punch_hole, fd, page * PAGE_SIZE, PAGE_SIZE)) for page in (4, 5)]
        before = kernel.resident(fd) // PAGE_SIZE
        inside = outcome(partial(kernel.punch_hole, fd, PAGE_SIZE, 2 * PAGE_SIZE))
        left = [[offset // PAGE_SIZE, size // PAGE_SIZE]
                for offset, size in kernel.resident_ranges(fd, 0, 4 * PAGE_SIZE)]
        again = outcome(partial(kernel.allocate, fd, PAGE_SIZE, 2 * PAGE_SIZE))
        return {"at and past the end": past, "pages": before, "inside": inside, "left": left, "filled again": again,
                "pages again": kernel.resident(fd) // PAGE_SIZE}


@asks(*range(62, 70))
@of_each_flavour
def _conversion(kernel: Kernel, flags: int) -> Answer:
    """Whether the file itself converts; what conversion is like above the kernel, tests/commands shows."""
    with file(kernel, 1, flags) as fd:
        if kernel.simulated:
            return {"convert": "OK" if kernel.conversion else "ENOTTY"}
        request = bytearray(uapi.KVM_SET_MEMORY_ATTRIBUTES2_SIZE)
        return {"convert": outcome(partial(fcntl.ioctl, fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, request, True))}

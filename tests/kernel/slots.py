"""Items 42 to 61 of the checklist as questions: a guest_memfd in the memslots of its VM."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

from gmemd.kernel import uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.linux import LinuxKernel
from gmemd.kernel.probe import outcome
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel import host
from tests.kernel.host import look, mapped
from tests.kernel.questions import ASKED_OF_LINUX, PMD, SHARED, Answer, Bare, Question, alike, asks, file

_EXITS = {host.EXIT_HLT: "HLT", host.EXIT_MMIO: "MMIO"}
# mov al, [0x2000]; cmp al, 0xaa; jne end; mov byte [0x2001], 0xff; end: hlt
_GUEST = bytes.fromhex("a00020 3caa 7505 c606012 0ff f4".replace(" ", ""))
CODE, DATA = 0x1000, 0x2000


def asks_slots(*items: int) -> Callable[[Question], Question]:
    return asks(*items, of=ASKED_OF_LINUX)


@contextmanager
def bound() -> Iterator[tuple[Bare, int]]:
    """A VM whose slots are all free, and a guest_memfd of four pages of it: with the default flags, or with none."""
    with closing(Bare()) as own, file(own, 4, (own.guest_memfd_flags or 0) & SHARED) as fd:
        yield own, fd


@asks_slots(42, 43)
def _flags(kernel: Kernel) -> Answer:
    with bound() as (own, fd), host.anonymous(PAGE_SIZE) as address:
        plain = [partial(host.set_region, own.vm, 0, 1 << bit, 0, PAGE_SIZE, address) for bit in range(2, 32)]
        more = [partial(host.set_region2, own.vm, 0, fd, flags=1 << bit, address=address) for bit in range(3, 32)]
        return {"bits 2 to 31": alike(iter(plain)), "bits 3 to 31": alike(iter(more))}


@asks_slots(44, 45)
def _other_flags(kernel: Kernel) -> Answer:
    with bound() as (own, fd):
        others = {"logged": host.KVM_MEM_LOG_DIRTY_PAGES, "read-only": host.KVM_MEM_READONLY, "no other": 0}
        return {name: outcome(partial(host.set_region2, own.vm, 0, fd, flags=uapi.KVM_MEM_GUEST_MEMFD | other))
                for name, other in others.items()}


@asks_slots(46, 47, 48, 49)
def _descriptors(kernel: Kernel) -> Answer:
    with bound() as (own, fd), bound() as (_, alien):
        memfd = os.memfd_create("ordinary")
        os.ftruncate(memfd, PAGE_SIZE)
        tried = {"the device": own.device, "a VM": own.vm, "a memfd": memfd, "another VM's": alien, "none": -1,
                 "its own": fd}
        answer = {name: outcome(partial(host.set_region2, own.vm, 0, number)) for name, number in tried.items()}
        os.close(memfd)
        return answer


@asks_slots(50, 51)
def _offsets(kernel: Kernel) -> Answer:
    with bound() as (own, fd):
        tried = {"within a page": range(1, PAGE_SIZE), "outside": (4 * PAGE_SIZE, (1 << 64) - PAGE_SIZE), "0": (0,)}
        return {name: alike(partial(host.set_region2, own.vm, 0, fd, offset=offset) for offset in offsets)
                for name, offsets in tried.items()}


@asks_slots(52, 53)
def _lifetime(kernel: Kernel) -> Answer:
    with closing(Bare()) as own:
        fd = own.create_guest_memfd(PAGE_SIZE, (own.guest_memfd_flags or 0) & SHARED)
        first = [outcome(partial(host.set_region2, own.vm, 0, fd)) for _ in range(2)]
        os.close(fd)
        return {"bound": first[0], "bound again": first[1],
                "deleted after its fd was closed": outcome(partial(host.set_region2, own.vm, 0, 0, size=0))}


@asks_slots(54, 55)
def _overlap(kernel: Kernel) -> Answer:
    with bound() as (own, fd):
        first = outcome(partial(host.set_region2, own.vm, 0, fd, size=2 * PAGE_SIZE, offset=PAGE_SIZE))
        second = partial(host.set_region2, own.vm, 1, fd, gpa=PMD)
        return {"first": first, "over a part": alike(partial(second, size=2 * PAGE_SIZE, offset=page * PAGE_SIZE)
                                                     for page in (0, 2)),
                "beside it": outcome(partial(second, offset=3 * PAGE_SIZE))}


@asks_slots(56, 57)
def _addresses(kernel: Kernel) -> Answer:
    with bound() as (own, fd):
        first = outcome(partial(host.set_region2, own.vm, 0, fd, gpa=PAGE_SIZE, size=2 * PAGE_SIZE))
        second = partial(host.set_region2, own.vm, 1, fd, size=2 * PAGE_SIZE, offset=2 * PAGE_SIZE)
        return {"first": first, "over a part": alike(partial(second, gpa=page * PAGE_SIZE) for page in (0, 2)),
                "beside it": outcome(partial(second, gpa=3 * PAGE_SIZE))}


@asks_slots(58, 59)
def _numbers(kernel: Kernel) -> Answer:
    with bound() as (own, fd):
        slots = host.slots_of(own.vm)
        tried = {"first": 0, "in the middle": slots // 2, "last": slots - 1, "one more": slots}
        return {"slots": slots,
                **{name: outcome(partial(host.set_region2, own.vm, slot, fd, gpa=page * PAGE_SIZE,
                                         offset=page * PAGE_SIZE))
                   for page, (name, slot) in enumerate(tried.items())}}


@asks_slots(60)
def _without_address(kernel: Kernel) -> Answer:
    return _run(with_address=False)


@asks_slots(61)
def _guest(kernel: Kernel) -> Answer:
    return _run(with_address=True)


def _run(*, with_address: bool) -> Answer:
    """How a guest ends that looks at the first byte of a bound page and writes the second, and what is there."""
    if platform.machine() != "x86_64":
        return {"guest": "its program is x86 code"}
    with bound() as (own, fd), mapped(fd, 4 * PAGE_SIZE) as address:
        reason = run_guest(own, fd, address, address + DATA if with_address else 0)
        return {"exit": _EXITS.get(reason, str(reason)), "bytes": look(address + DATA, 2).hex()}


def run_guest(own: LinuxKernel, fd: int, address: int, data_address: int) -> int:
    """Run the guest, its code and data in two bound slots at these host addresses; return the exit."""
    host.fill(address + DATA, 0xAA, PAGE_SIZE)
    host.copy(address + CODE, _GUEST)
    host.set_region2(own.vm, 0, fd, size=DATA, address=address)
    host.set_region2(own.vm, 1, fd, gpa=DATA, offset=DATA, address=data_address)
    with host.vcpu(own.device, own.vm) as run:
        return run(CODE)

"""Conversion: making ranges of a guest_memfd private or shared, and setting preserved private bytes aside."""

from __future__ import annotations

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.sealed import new_memfd
from gmemd.kernel.content import copy_in, copy_out
from gmemd.kernel.kernel import Kernel
from gmemd.memory.piece import Aside
from gmemd.memory.ranges import PRIVATE, SHARED, RangeMap


def convert(backend: HostMemoryBackend, kernel: Kernel, offset: int, size: int, to: bool, *, preserve: bool) -> int:
    """Make a checked range private or shared; the number of bytes that changed. OSError when the kernel refuses.

    Follows the proposed KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd: content is zero afterwards unless preserved.
    Call set_aside() before for what is to be preserved as private; forget() what has become shared once that is
    durable.
    """
    visibility = backend.visibility
    assert visibility is not None
    parts = _others(visibility, offset, size, to)
    kernel.convert(backend.fd, offset, size, parts, private=to)
    if to is SHARED:
        fill(backend, kernel, parts)
        if preserve and backend.aside is not None:
            for start, length in parts:
                for found, count in kernel.present_ranges(backend.aside.fd, start, length):
                    copy_in(backend.aside.fd, backend.fd, found, count)
    visibility.set(offset, size, to)
    return sum(length for _, length in parts)


def _others(visibility: RangeMap, offset: int, size: int, to: bool) -> list[tuple[int, int]]:
    """The parts of a range that are not yet in this state."""
    return [(start, length) for start, length, state in visibility.ranges(offset, size) if state != to]


def fill(backend: HostMemoryBackend, kernel: Kernel, parts: list[tuple[int, int]]) -> None:
    """Allocate parts in which a missing page would fault although it is shared; all or, on OSError, none of them."""
    if not backend.enforcers:
        return
    done: list[tuple[int, int]] = []
    try:
        for start, length in parts:
            done.append((start, length))
            kernel.populate(backend.fd, start, length, 1)
    except OSError:
        for start, length in done:
            kernel.punch_hole(backend.fd, start, length)
        raise


def set_aside(backend: HostMemoryBackend, kernel: Kernel, offset: int, size: int) -> None:
    """Copy what exists of the shared parts of a range into the memfd of private bytes, created if needed."""
    assert backend.visibility is not None
    forget(backend, kernel, offset, size)
    for start, length in _others(backend.visibility, offset, size, PRIVATE):
        for found, count in kernel.present_ranges(backend.fd, start, length):
            if backend.aside is None:
                fd = new_memfd(kernel, f"{backend.id}[private]", backend.memory_size)
                backend.aside = Aside(backend, fd)
            copy_out(backend.fd, backend.aside.fd, found, count)


def forget(backend: HostMemoryBackend, kernel: Kernel, offset: int, size: int) -> None:
    """Drop what was set aside for the shared parts of a range."""
    assert backend.visibility is not None
    if backend.aside is not None:
        for start, length in _others(backend.visibility, offset, size, PRIVATE):
            kernel.punch_hole(backend.aside.fd, start, length)


def reconcile(backend: HostMemoryBackend, kernel: Kernel) -> None:
    """After a crash: put back bytes of unfinished conversions to private, as far as they are missing."""
    assert backend.visibility is not None
    assert backend.aside is not None
    for start, length in _others(backend.visibility, 0, backend.memory_size, PRIVATE):
        for found, count in kernel.present_ranges(backend.aside.fd, start, length):
            at = found
            for present, present_size in [*kernel.present_ranges(backend.fd, found, count), (found + count, 0)]:
                if present > at:
                    copy_in(backend.aside.fd, backend.fd, at, present - at)
                at = present + present_size
    forget(backend, kernel, 0, backend.memory_size)

"""guest_memfd memory: memory-backend-guest-memfd, and what guest-memfd=on of memory-backend-memfd makes.

Both are a KVM guest_memfd of flags MMAP | INIT_SHARED: mapped like a memfd, fully shared, fixed in size.
"""

from __future__ import annotations

import os
from typing import ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.sealed import new_memfd
from gmemd.errors import QmpError
from gmemd.kernel.content import copy_in, copy_out
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.uapi import GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_SHARED
from gmemd.memory.ranges import PRIVATE, SHARED, RangeMap


def make_guest_memfd(backend: HostMemoryBackend, kernel: Kernel, flags: int = GUEST_MEMFD_SHARED) -> None:
    """Set the backend's fd to a new guest_memfd; refusals in the words of QEMU's kvm_create_guest_memfd."""
    legal = kernel.guest_memfd_flags
    if legal is None:
        raise QmpError("KVM does not support guest_memfd")
    if flags & ~legal:
        raise QmpError(f"Current KVM instance does not support guest-memfd flag: {flags & ~legal:#x}")
    try:
        backend.fd = kernel.create_guest_memfd(backend.size, flags)
    except OSError as exc:
        raise QmpError(f"Error creating KVM guest_memfd: {os.strerror(exc.errno or 0)}") from exc
    backend.kind = "guest-memfd"
    backend.guest_memfd_flags = flags
    backend.memory_size = backend.size
    backend.visibility = RangeMap(backend.size, SHARED if flags & GUEST_MEMFD_FLAG_INIT_SHARED else PRIVATE)
    if backend.size > 1 << 40:
        backend.check_mappable(kernel)


class GuestMemfdBackend(HostMemoryBackend):
    """The dedicated type of the newer QEMU series, with the kernel's creation flags as properties."""

    qom_type = "memory-backend-guest-memfd"
    own_order = ("init-shared", "mmap")
    fixed: ClassVar[dict[str, str]] = {
        **HostMemoryBackend.fixed,
        "init-shared": "cannot change property value",
        "mmap": "cannot change property value",
    }

    def allocate(self, kernel: Kernel) -> None:
        if not self.properties["share"]:
            raise QmpError("can't create guest_memfd backend with `share=off`")
        if not self.properties["mmap"]:
            make_guest_memfd(self, kernel, 0)
            return
        begins_shared = self.properties["init-shared"]
        # Where only gmemd converts, the kernel must not stand in the way of what becomes shared later.
        make_guest_memfd(self, kernel, GUEST_MEMFD_SHARED if begins_shared or not kernel.conversion
                         else GUEST_MEMFD_FLAG_MMAP)
        if not begins_shared:
            self.visibility = RangeMap(self.size, PRIVATE)


def convert(backend: HostMemoryBackend, kernel: Kernel, offset: int, size: int, to: bool, *, preserve: bool) -> int:
    """Make a checked range private or shared; the bytes that changed. OSError when the kernel refuses.

    Follows the proposed KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd: content is zero afterwards unless preserved.
    What is to be preserved as private was set_aside() before; forget() what has become shared when that is durable.
    """
    visibility = backend.visibility
    assert visibility is not None
    parts = _others(visibility, offset, size, to)
    kernel.convert(backend.fd, offset, size, parts, private=to)
    if to is SHARED:
        fill(backend, kernel, parts)
        if preserve and backend.private_fd >= 0:
            for start, length in parts:
                for found, count in kernel.present_ranges(backend.private_fd, start, length):
                    copy_in(backend.private_fd, backend.fd, found, count)
    visibility.set(offset, size, to)
    return sum(length for _, length in parts)


def _others(visibility: RangeMap, offset: int, size: int, to: bool) -> list[tuple[int, int]]:
    """The parts of a range that are not yet as they should become."""
    return [(start, length) for start, length, state in visibility.ranges(offset, size) if state != to]


def fill(backend: HostMemoryBackend, kernel: Kernel, parts: list[tuple[int, int]]) -> None:
    """Allocate parts where a missing page would fault though it is shared; all of them or, on OSError, none."""
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
    """Copy what exists of the shared parts of a range into the memfd of private bytes, which is made if need be."""
    assert backend.visibility is not None
    forget(backend, kernel, offset, size)
    for start, length in _others(backend.visibility, offset, size, PRIVATE):
        for found, count in kernel.present_ranges(backend.fd, start, length):
            if backend.private_fd < 0:
                backend.private_fd = new_memfd(kernel, f"{backend.id}[private]", backend.memory_size)
            copy_out(backend.fd, backend.private_fd, found, count)


def forget(backend: HostMemoryBackend, kernel: Kernel, offset: int, size: int) -> None:
    """Drop what was kept aside of the parts of a range that are shared."""
    assert backend.visibility is not None
    if backend.private_fd >= 0:
        for start, length in _others(backend.visibility, offset, size, PRIVATE):
            kernel.punch_hole(backend.private_fd, start, length)


def reconcile(backend: HostMemoryBackend, kernel: Kernel) -> None:
    """After a crash: put back what was on its way to become private and is not, as far as it is no longer there."""
    assert backend.visibility is not None
    for start, length in _others(backend.visibility, 0, backend.memory_size, PRIVATE):
        for found, count in kernel.present_ranges(backend.private_fd, start, length):
            at = found
            for present, present_size in [*kernel.present_ranges(backend.fd, found, count), (found + count, 0)]:
                if present > at:
                    copy_in(backend.private_fd, backend.fd, at, present - at)
                at = present + present_size
    forget(backend, kernel, 0, backend.memory_size)

"""guest_memfd memory: memory-backend-guest-memfd, and guest-memfd=on of memory-backend-memfd.

Both are a KVM guest_memfd with the flags MMAP | INIT_SHARED: mapped like a memfd, fully shared, of fixed size.
"""

from __future__ import annotations

import os
from typing import ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError
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
        # If only gmemd converts, the kernel must not block what becomes shared later.
        make_guest_memfd(self, kernel, GUEST_MEMFD_SHARED if begins_shared or not kernel.conversion
                         else GUEST_MEMFD_FLAG_MMAP)
        if not begins_shared:
            self.visibility = RangeMap(self.size, PRIVATE)

"""guest_memfd memory: memory-backend-guest-memfd, and what guest-memfd=on of memory-backend-memfd makes.

Both are a KVM guest_memfd of flags MMAP | INIT_SHARED: mapped like a memfd, fully shared, fixed in size.
"""

from __future__ import annotations

import os

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError
from gmemd.kernel.base import Kernel

# include/uapi/linux/kvm.h
GUEST_MEMFD_FLAG_MMAP = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1
SHARED_FLAGS = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED


def make_guest_memfd(backend: HostMemoryBackend, kernel: Kernel, flags: int = SHARED_FLAGS) -> None:
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
    if backend.size > 1 << 40:
        backend.check_mappable(kernel)


class GuestMemfdBackend(HostMemoryBackend):
    """The dedicated type of the newer QEMU series; no properties of its own."""

    qom_type = "memory-backend-guest-memfd"

    def allocate(self, kernel: Kernel) -> None:
        if not self.properties["share"]:
            raise QmpError("can't create guest_memfd backend with `share=off`")
        make_guest_memfd(self, kernel)

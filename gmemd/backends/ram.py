"""memory-backend-ram: anonymous memory; here a sealed memfd, so that it can be handed out and kept."""

from __future__ import annotations

import os

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.sealed import new_memfd
from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel

_ALIGN = 2 << 20  # bytes: how QEMU aligns anonymous memory on x86 (QEMU_VMALLOC_ALIGN)


class RamBackend(HostMemoryBackend):
    """Refuses what the kernel would refuse to map anonymously, then creates a memfd of the rounded size."""

    qom_type = "memory-backend-ram"

    def allocate(self, kernel: Kernel) -> None:
        self.memory_size = self.round_up(kernel.page_size)
        reserve, share = self.properties["reserve"], self.properties["share"]
        # A size that rounds up to 0 is too large.
        wanted = self.memory_size or (1 << 64) - kernel.page_size
        try:
            self.try_reserve(kernel, _ALIGN)
            # Shared memory is a file's, which the kernel does not count before it is allocated.
            kernel.try_map(None, wanted, reserve=reserve and not share, writable=not share, shared=False)
            self.fd = new_memfd(kernel, self.id, self.memory_size)
        except OSError as exc:
            raise QmpError(f"cannot set up guest memory '{self.region_name}': {os.strerror(exc.errno or 0)}") from exc

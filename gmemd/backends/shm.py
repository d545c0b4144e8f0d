"""memory-backend-shm: POSIX shared memory that is unlinked at once; here the equivalent, a memfd."""

from __future__ import annotations

import os

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.uapi import MFD_CLOEXEC


class ShmBackend(HostMemoryBackend):
    """Always shared, never sealed (an unlinked shm object has no seals)."""

    qom_type = "memory-backend-shm"

    def allocate(self, kernel: Kernel) -> None:
        if not self.properties["share"]:
            raise QmpError("can't create shm backend with `share=off`")
        self.memory_size = self.round_up(kernel.page_size)
        try:
            self.fd = kernel.memfd_create(self.id[:200], MFD_CLOEXEC)
        except OSError as exc:
            raise QmpError(f"failed to create POSIX shared memory: {os.strerror(exc.errno or 0)}") from exc
        try:
            kernel.truncate(self.fd, self.size)
        except OSError as exc:
            raise QmpError(f"failed to resize POSIX shared memory to {self.size}: "
                           f"{os.strerror(exc.errno or 0)}") from exc
        self.check_backing(self.size)
        self.check_mappable(kernel)

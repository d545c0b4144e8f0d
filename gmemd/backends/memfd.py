"""memory-backend-memfd: a sealed memfd, huge pages on request, or a KVM guest_memfd with guest-memfd=on."""

from __future__ import annotations

import os
from typing import ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.guest_memfd import make_guest_memfd
from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.uapi import MFD_ALLOW_SEALING, MFD_CLOEXEC, MFD_HUGE_SHIFT, MFD_HUGETLB, SEALS_OF_SIZE

_SEALABLE = MFD_CLOEXEC | MFD_ALLOW_SEALING
_SURELY_MAPPABLE = 1 << 40  # bytes, shared; above this, and for private memory and huge pages, mmap(2) is tried


class MemfdBackend(HostMemoryBackend):
    """Shared by default; seals growing and shrinking by default."""

    qom_type = "memory-backend-memfd"
    own_order = ("guest-memfd", "hugetlb", "seal", "hugetlbsize")
    fixed: ClassVar[dict[str, str]] = {**HostMemoryBackend.fixed, "hugetlbsize": "cannot change property value"}
    unseen = HostMemoryBackend.unseen | {"hugetlbsize"}

    def check_value(self, name: str, value: object) -> None:
        if name == "hugetlbsize" and value == 0:
            raise QmpError(f"Property '{self.qom_type}.hugetlbsize' doesn't take value '0'")
        super().check_value(name, value)

    def allocate(self, kernel: Kernel) -> None:
        properties = self.properties
        if properties["guest-memfd"] == "on":
            self._allocate_guest_memfd(kernel)
            return
        flags = _SEALABLE if properties["seal"] else MFD_CLOEXEC
        if properties["hugetlb"] or "hugetlbsize" in properties:
            flags |= self._huge_flags()
        try:
            self.fd = kernel.memfd_create(self.id[:200], flags)
        except OSError as exc:
            raise QmpError(f"failed to create memfd with flags {flags:#x}: {os.strerror(exc.errno or 0)}") from exc
        self.memory_size = self.round_up(kernel.file_page_size(self.fd) if flags & MFD_HUGETLB else kernel.page_size)
        try:
            kernel.truncate(self.fd, self.size)
        except OSError as exc:
            raise QmpError(f"failed to resize memfd to {self.size}: {os.strerror(exc.errno or 0)}") from exc
        if properties["seal"]:
            try:
                kernel.seal(self.fd, SEALS_OF_SIZE)
            except OSError as exc:
                raise QmpError(f"failed to add seals to memfd: {os.strerror(exc.errno or 0)}") from exc
        if self.memory_size != self.size:
            self.check_backing(self.size)
        if flags & MFD_HUGETLB or not properties["share"] or self.size > _SURELY_MAPPABLE:
            self.check_mappable(kernel, shared=properties["share"])

    def _allocate_guest_memfd(self, kernel: Kernel) -> None:
        if not self.properties["share"]:
            raise QmpError("guest-memfd=on must be used with share=on")
        if self.properties["hugetlb"]:
            raise QmpError("guest-memfd=on doesn't support hugetlb=on")
        make_guest_memfd(self, kernel)

    def _huge_flags(self) -> int:
        """The memfd_create(2) flags for huge pages, if there are to be any."""
        hugetlbsize = self.properties.get("hugetlbsize", 0)
        given = hugetlbsize if not hugetlbsize & 1 else 0
        if given & (given - 1):
            raise QmpError("Hugepage size must be a power of 2")
        if not self.properties["hugetlb"]:
            return 0
        return MFD_HUGETLB | ((given.bit_length() - 1) << MFD_HUGE_SHIFT if given else 0)

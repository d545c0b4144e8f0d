"""What is real in both kernels: memfds, files, huge pages; allocation, residency, policy, head-room."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from stat import S_ISREG
from typing import Self

from gmemd.kernel import backing, hugepages, numa, residency, standin, syscalls, uapi
from gmemd.kernel.base import PAGE_SIZE, Headroom, HugePool, check_inside, check_range, refuse
from gmemd.kernel.headroom import HeadroomReader, check_memory, check_pool
from gmemd.kernel.populate import populate


class OrdinaryMemory:
    """The half of a Kernel that needs no KVM; see base.Kernel for each method's contract."""

    page_size = PAGE_SIZE

    def memfd_create(self, name: str, flags: int) -> int:
        return os.memfd_create(name, flags | uapi.MFD_CLOEXEC)

    def truncate(self, fd: int, size: int) -> None:
        if size > uapi.OFFSET_MAX:
            raise refuse(errno.EINVAL)
        os.ftruncate(fd, size)

    def seal(self, fd: int, seals: int) -> None:
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, seals)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        check_inside(offset, size, os.fstat(fd).st_size)
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE, offset, size)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        check_range(offset, size)
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, offset, size)

    def convert(self, fd: int, offset: int, size: int, parts: Sequence[tuple[int, int]], *, private: bool) -> None:
        for start, length in parts:
            self.punch_hole(fd, start, length)

    def populate(
        self,
        fd: int,
        offset: int,
        size: int,
        threads: int,
        *,
        fresh: bool = False,
        policy: str = "default",
        nodes: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        check_inside(offset, size, os.fstat(fd).st_size)
        populate(
            fd,
            offset,
            size,
            threads,
            fresh=fresh,
            placed=partial(self.policy_for_thread, policy, nodes) if policy != "default" else nullcontext,
            progress=progress,
            cancelled=cancelled,
        )

    def resident(self, fd: int, offset: int = 0, size: int = 0) -> int:
        return residency.resident(fd, offset, size)

    def resident_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        return residency.resident_ranges(fd, offset, size)

    def present_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        known = backing.contents(fd, offset, size)
        return residency.data_ranges(fd, offset, size) if known is None else known

    def try_map(
        self,
        fd: int | None,
        size: int,
        *,
        reserve: bool,
        offset: int = 0,
        writable: bool = True,
        shared: bool = True,
    ) -> None:
        protection = uapi.PROT_READ | (uapi.PROT_WRITE if writable else 0)
        flags = uapi.MAP_SHARED if shared else uapi.MAP_PRIVATE
        if not reserve:
            flags |= uapi.MAP_NORESERVE
        if fd is None:
            fd, flags = -1, flags | uapi.MAP_ANONYMOUS
        syscalls.munmap(syscalls.mmap(size, protection, flags, fd, offset), size)

    def set_policy(self, fd: int, size: int, policy: str, nodes: Sequence[int]) -> None:
        numa.set_policy(fd, size, policy, nodes)

    def policy_for_thread(self, policy: str, nodes: Sequence[int]) -> AbstractContextManager[None]:
        return numa.policy_for_thread(policy, nodes)

    def headroom(self) -> Headroom:
        return HeadroomReader().read()

    def headrooms(self) -> list[Headroom]:
        return HeadroomReader().read_all()

    def check_headroom(self, size: int, fd: int | None = None) -> None:
        page = PAGE_SIZE if fd is None else backing.page_size(fd)
        if page == PAGE_SIZE:
            check_memory(size, HeadroomReader())
        else:
            check_pool(size, page)

    def huge_pools(self) -> list[HugePool]:
        return hugepages.huge_pools()

    def duplicate(self, fd: int) -> int:
        return os.dup(fd)

    def identify(self, fd: int) -> str:
        link = os.readlink(f"/proc/self/fd/{fd}")
        magic, _ = syscalls.filesystem(fd)
        is_real = magic == uapi.GUEST_MEMFD_MAGIC or link == "anon_inode:[kvm-gmem]"
        if is_real or self.is_simulated(fd):
            return "guest-memfd"
        if link.startswith("/memfd:") and syscalls.seals(fd) is not None:
            return "hugetlb-memfd" if magic == uapi.HUGETLBFS_MAGIC else "memfd"
        return "file" if S_ISREG(os.fstat(fd).st_mode) else "other"

    def seals(self, fd: int) -> int | None:
        return syscalls.seals(fd)

    def unusable(self, fd: int, size: int) -> str:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
            return "the descriptor was not opened for reading and writing"
        if flags & os.O_APPEND:  # pwrite(2) would append whatever the offset
            return "the descriptor was opened for appending"
        if (syscalls.seals(fd) or 0) & (uapi.F_SEAL_WRITE | uapi.F_SEAL_FUTURE_WRITE):
            return "the memfd is sealed against writing"
        if syscalls.filesystem(fd)[0] == uapi.SECRETMEM_MAGIC:
            return "the descriptor is secret memory, which no guest can use"
        try:
            self.try_map(fd, size, reserve=False)
        except OSError as exc:
            return f"the descriptor cannot be mapped for reading and writing: {os.strerror(exc.errno or 0)}"
        return ""

    def file_page_size(self, fd: int) -> int:
        return backing.page_size(fd)

    @cached_property
    def hugepage_size(self) -> int:
        return hugepages.default_size()

    def is_simulated(self, fd: int) -> bool:
        return standin.flags_of(fd) is not None

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

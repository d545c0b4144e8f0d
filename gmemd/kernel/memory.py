"""What is real in both kernels: memfds, files, huge pages; allocation, residency, policy, head-room."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from stat import S_ISREG

from . import hugepages, numa, residency, standin, syscalls, uapi
from .base import PAGE_SIZE, Headroom, HugePool, NoHeadroom, check_inside, check_range, refuse
from .headroom import HeadroomReader, pool_headroom, with_overhead
from .populate import Population, without

_ALLOCATE = uapi.FALLOC_FL_KEEP_SIZE
_PUNCH = uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE


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
        syscalls.fallocate(fd, _ALLOCATE, offset, size)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        check_range(offset, size)
        syscalls.fallocate(fd, _PUNCH, offset, size)

    def populate(
        self,
        fd: int,
        offset: int,
        size: int,
        threads: int,
        *,
        fresh: bool = True,
        policy: str = "default",
        nodes: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        check_inside(offset, size, os.fstat(fd).st_size)
        page = self.file_page_size(fd)
        existing = _existing(fd, offset, size) if fresh else None
        check = self._step_check(size - _present(fd, offset, size), page)
        placed = partial(self.policy_for_thread, policy, nodes) if policy != "default" else nullcontext
        population = Population(
            partial(syscalls.fallocate, fd, _ALLOCATE),
            offset,
            size,
            check=check,
            progress=progress,
            cancelled=cancelled,
        )
        try:
            population.run(threads, placed, page)
        except BaseException as exc:
            if existing is not None:
                self._give_back(fd, without(existing, offset, population.reached), exc)
            raise

    def _step_check(self, missing: int, page: int) -> Callable[[int], None]:
        """Raise NoHeadroom if what is missing does not fit; return the check before each step.

        A pool of huge pages ends in ENOSPC, not in a kill, so a look at the start is enough.
        """
        if page != PAGE_SIZE:
            self._check_pool(missing, page)
            return lambda size: None
        reader = HeadroomReader()
        _check_memory(missing, reader)
        return partial(_check_memory, reader=reader)

    def _give_back(self, fd: int, ranges: list[tuple[int, int]], reason: BaseException) -> None:
        try:
            for start, length in ranges:
                self.punch_hole(fd, start, length)
        except OSError as exc:
            reason.add_note(f"what was allocated could not be given back: {exc.strerror}")

    def resident(self, fd: int, offset: int = 0, size: int = 0) -> int:
        return residency.resident(fd, offset, size)

    def resident_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        return residency.resident_ranges(fd, offset, size)

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

    def check_headroom(self, size: int, fd: int | None = None) -> None:
        page = PAGE_SIZE if fd is None else self.file_page_size(fd)
        if page == PAGE_SIZE:
            _check_memory(size, HeadroomReader())
        else:
            self._check_pool(size, page)

    def _check_pool(self, size: int, page: int) -> None:
        pool = next(pool for pool in self.huge_pools() if pool.page_size == page and pool.node is None)
        left = pool_headroom(pool)
        if size > left.available:
            raise NoHeadroom(size, left)

    def huge_pools(self) -> list[HugePool]:
        return hugepages.huge_pools()

    def identify(self, fd: int) -> str:
        link = os.readlink(f"/proc/self/fd/{fd}")
        magic, _ = syscalls.filesystem(fd)
        is_real = magic == uapi.GUEST_MEMFD_MAGIC or link == "anon_inode:[kvm-gmem]"
        if is_real or self.is_simulated(fd):
            return "guest-memfd"
        if link.startswith("/memfd:") and _seals(fd) is not None:
            return "hugetlb-memfd" if magic == uapi.HUGETLBFS_MAGIC else "memfd"
        return "file" if S_ISREG(os.fstat(fd).st_mode) else "other"

    def file_page_size(self, fd: int) -> int:
        magic, block_size = syscalls.filesystem(fd)
        return block_size if magic == uapi.HUGETLBFS_MAGIC else PAGE_SIZE

    @cached_property
    def hugepage_size(self) -> int:
        return hugepages.default_size()

    def is_simulated(self, fd: int) -> bool:
        return standin.flags_of(fd) is not None

    def close(self) -> None:
        pass


def _seals(fd: int) -> int | None:
    """Return the seals of a memfd; None for what cannot have any."""
    try:
        return fcntl.fcntl(fd, uapi.F_GET_SEALS)
    except OSError:
        return None


def _check_memory(size: int, reader: HeadroomReader) -> None:
    left = reader.read()
    if with_overhead(size) > left.available:
        raise NoHeadroom(size, left)


def _existing(fd: int, offset: int, size: int) -> list[tuple[int, int]] | None:
    """Return what exists already in the range; None when the kernel does not say (a part of huge pages)."""
    try:
        return residency.resident_ranges(fd, offset, size)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return None


def _present(fd: int, offset: int, size: int) -> int:
    """Return how many bytes of the range exist, for a forecast: 0 where the kernel does not say."""
    try:
        return residency.resident(fd, offset, size)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return 0

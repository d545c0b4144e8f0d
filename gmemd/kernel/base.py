"""What makes and measures memory, as a Protocol, and the rule set that every implementation keeps.

The rules are guest_memfd's, the stricter ones, for every fd that goes through gmemd: sizes and ranges are
aligned to `page_size` and not empty, the size is fixed by the caller's seals, allocation keeps the size and
stays inside it, a punch past the end does nothing. What was not allowed raises the errno the kernel gives
for a guest_memfd.

No asyncio here. Methods that say "may take long" are for worker threads; system calls release the GIL.
Every error of the system is the bare OSError, turned into QmpError by whoever knows what was being done.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, Protocol

from gmemd.kernel.uapi import OFFSET_MAX

PAGE_SIZE: Final = os.sysconf("SC_PAGESIZE")  # bytes; 4, 16 or 64 KiB on arm64
POLICIES: Final = ("default", "preferred", "bind", "interleave")


class Headroom(NamedTuple):
    """How much can still be allocated, and what sets that limit."""

    available: int  # bytes; never negative
    total: int  # bytes
    limit: str  # what limits: "the machine", "the cgroup /a/b", "the pool of 2048 KiB pages"

    def __str__(self) -> str:
        return f"{self.available} of {self.total} bytes left in {self.limit}"


class NoHeadroom(OSError):
    """ENOMEM before it is an OOM kill: `wanted` bytes do not fit into `headroom`."""

    def __init__(self, wanted: int, headroom: Headroom) -> None:
        super().__init__(errno.ENOMEM, f"{wanted} bytes wanted, {headroom}")
        self.wanted = wanted  # bytes
        self.headroom = headroom


class HugePool(NamedTuple):
    """One pool of huge pages: of one size, on one node or (node None) of the machine. Counts are in pages."""

    page_size: int  # bytes
    node: int | None
    total: int
    free: int
    surplus: int
    reserved: int  # of the free ones, promised to mappings; counted only as a whole: 0 for a node
    overcommit: int  # how many surplus pages the kernel may make in all; 0 for a node


class PageInUse(OSError):
    """EAGAIN of a conversion: somebody holds the page at `offset` (bytes); nothing was converted."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.EAGAIN, f"page in use at {offset:#x}")
        self.offset = offset


class Kernel(Protocol):
    """What makes memory: real Linux with KVM, or the simulation. Chosen once, by `choose.choose_kernel`."""

    name: str  # "kvm" or "simulated"
    why: str  # one clause for people: why this one was chosen
    kvm_present: bool  # for query-kvm
    kvm_enabled: bool  # for query-kvm
    guest_memfd_flags: int | None  # mask of the legal creation flags; None: no guest_memfd at all
    shared_policy: bool  # a guest_memfd keeps its NUMA policy (Linux 6.19); else it is placed by populate
    conversion: bool  # the guest_memfd itself can be converted between private and shared
    simulated: bool  # the guest_memfds that it makes are stand-ins
    guest_counter: str  # what of /proc/meminfo they are counted in
    page_size: int  # bytes

    @property
    def hugepage_size(self) -> int:
        """Bytes of a huge page where no size is asked for."""
        ...

    def memfd_create(self, name: str, flags: int) -> int:
        """Make a memfd as memfd_create(2) and return its fd, which the caller owns; CLOEXEC is always set.

        EINVAL: unknown flags. ENODEV: no such huge page size.
        """
        ...

    def truncate(self, fd: int, size: int) -> None:
        """Set the size in bytes; EINVAL from 2^63 on, for negative ones, and unaligned on huge pages."""
        ...

    def seal(self, fd: int, seals: int) -> None:
        """Add seals (uapi.F_SEAL_*) to a memfd; EPERM when sealed against that, EINVAL when it is none."""
        ...

    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Make a guest_memfd, fixed in size for life; return its fd, which the caller owns; CLOEXEC is set.

        EINVAL: size 0, not a multiple of the page or not below 2^63, or a flag outside `guest_memfd_flags`.
        ENOTTY: no guest_memfd.
        """
        ...

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Allocate the pages of a range inside the size, in one step; what exists stays. May take long.

        EINVAL: unaligned, empty, negative or past the size. EFBIG: past 2^63. ENOSPC: the huge pages ran out.
        Not atomic: after a failure a part may stay. `populate` checks, goes in steps and takes back.
        """
        ...

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        """Give the pages of a range back; it then reads as zeros. At and past the end nothing happens.

        EINVAL: unaligned, empty or negative. EFBIG: past 2^63. EPERM: sealed against writing.
        """
        ...

    def convert(self, fd: int, offset: int, size: int, parts: Sequence[tuple[int, int]], *, private: bool) -> None:
        """Make a checked range of a guest_memfd private or shared; `parts` are (offset, bytes) of what changes.

        Where the kernel itself converts (`conversion`) it is asked; else the bytes only leave the view that
        holders have. Either way the content of the parts is zero afterwards. PageInUse, or the kernel's errno.
        """
        ...

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
        """Allocate a range by `threads` threads in steps, looking at the head-room before each. Takes long.

        threads: the most, the caller's own included; no more than there are CPUs are used.
        fresh: nobody else has the fd yet; then a failure or cancellation gives back exactly what was newly
        allocated (a disk's file is left alone). Otherwise it stays: a holder may have written there already.
        policy, nodes: set for the threads; a guest_memfd without `shared_policy` is placed only by this.
        progress is told the bytes done so far, cancelled is asked between steps; both are called in any of
        the threads, one at a time. Raises NoHeadroom (ENOMEM), ECANCELED, or the errno of `allocate`.
        """
        ...

    def resident(self, fd: int, offset: int = 0, size: int = 0) -> int:
        """Return how many bytes of the range are in memory; size 0 is to the end. Touches nothing.

        Exact (cachestat); huge pages are counted by st_blocks, for the whole file only (a part: EOPNOTSUPP).
        """
        ...

    def resident_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        """Return [(offset, bytes)] of what is resident, ascending, neighbours joined. May take long."""
        ...

    def present_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        """Return [(offset, bytes)] of all that may hold anything but zeros: what is resident or in swap, ascending.

        Where not all can be counted, pages that were allocated and never touched are left out.
        """
        ...

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
        """Map and unmap untouched; fd None is anonymous memory. Raises what mmap(2) raises."""
        ...

    def set_policy(self, fd: int, size: int, policy: str, nodes: Sequence[int]) -> None:
        """Set where pages of the file will come from; EINVAL when none of the nodes is online.

        Has effect where the file keeps a policy (memfd, huge pages, guest_memfd with `shared_policy`).
        """
        ...

    def policy_for_thread(self, policy: str, nodes: Sequence[int]) -> AbstractContextManager[None]:
        """Place what the calling thread allocates in the block; its own policy comes back after it."""
        ...

    def headroom(self) -> Headroom:
        """Return how much memory can still be allocated before the cgroup or the machine is full."""
        ...

    def headrooms(self) -> list[Headroom]:
        """Return the machine's head-room and that of each memory cgroup with a limit, its own first."""
        ...

    def check_headroom(self, size: int, fd: int | None = None) -> None:
        """Raise NoHeadroom when size bytes more do not fit; with an fd on huge pages, into their pool."""
        ...

    def huge_pools(self) -> list[HugePool]:
        """Return the pools of huge pages, by size: first the machine's, then each node's."""
        ...

    def duplicate(self, fd: int) -> int:
        """Return another fd of the same file for somebody to be given; the caller owns it, CLOEXEC is set."""
        ...

    def identify(self, fd: int) -> str:
        """Return "guest-memfd", "memfd", "hugetlb-memfd", "file" or "other": by link, magic and seals."""
        ...

    def seals(self, fd: int) -> int | None:
        """Return the seals of a memfd (uapi.F_SEAL_*); None for what cannot have any."""
        ...

    def unusable(self, fd: int, size: int) -> str:
        """Return why somebody else's fd is not memory to read and write, a sentence about it; "" when it is.

        Its access mode, O_APPEND and seals are named; what else mmap(2) refuses is asked of the kernel.
        """
        ...

    def file_page_size(self, fd: int) -> int:
        """Return the bytes of the pages that back a file: huge ones, or `page_size`."""
        ...

    def is_simulated(self, fd: int) -> bool:
        """Tell whether a guest_memfd is a stand-in, by whichever kernel it was made."""
        ...

    def probe(self) -> Mapping[str, int | str]:
        """Try the real thing item by item and return the outcomes, as `gmemctl doctor` shows them."""
        ...

    def close(self) -> None:
        """Give the kernel's own fds back; memory that was made lives on with its holders."""
        ...


def refuse(code: int) -> OSError:
    """Return the OSError of an errno, as the kernel would have raised it."""
    return OSError(code, os.strerror(code))


def check_range(offset: int, size: int) -> None:
    """Raise what fallocate(2) on a guest_memfd raises for a range: EINVAL (sign, alignment) or EFBIG."""
    if not (0 <= offset <= OFFSET_MAX and 0 < size <= OFFSET_MAX):
        raise refuse(errno.EINVAL)
    if offset + size > OFFSET_MAX:
        raise refuse(errno.EFBIG)
    if (offset | size) % PAGE_SIZE:
        raise refuse(errno.EINVAL)


def check_inside(offset: int, size: int, limit: int) -> None:
    """Raise EINVAL also when the range ends past the file's size."""
    check_range(offset, size)
    if offset + size > limit:
        raise refuse(errno.EINVAL)

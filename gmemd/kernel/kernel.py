"""What creates and measures memory: everything that kernels do alike, and what each does in its own way.

The rules are guest_memfd's, the stricter ones, for every fd that goes through gmemd: sizes and ranges are aligned to
`page_size` and not empty, the size is fixed by the caller's seals, allocation keeps the size and stays inside it, a
punch past the end does nothing. A violation raises the errno that the kernel returns for a guest_memfd.

No asyncio here. Methods that say "may take long" are for worker threads; system calls release the GIL.
Errors of the system are plain OSErrors; the caller, which knows what was being done, turns them into QmpError.
"""

from __future__ import annotations

import errno
import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from stat import S_ISREG

from gmemd.kernel import backing, hugepages, numa, populate, residency, standin, syscalls, uapi
from gmemd.kernel.headroom import Headroom, HeadroomReader, check_memory, check_pool
from gmemd.kernel.rules import PAGE_SIZE, check_inside, check_range, refuse


class PageInUse(OSError):
    """EAGAIN of a conversion: the page at `offset` (bytes) is in use; nothing was converted."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.EAGAIN, f"page in use at {offset:#x}")
        self.offset = offset


class Kernel(ABC):
    """What creates memory: real Linux with KVM, or the simulation. Chosen once, by `choose.choose_kernel`."""

    name: str  # "kvm" or "simulated"
    why: str  # why this one was chosen, a readable clause
    kvm_present: bool  # for query-kvm
    kvm_enabled: bool  # for query-kvm
    guest_memfd_flags: int | None  # mask of the legal creation flags; None: no guest_memfd at all
    shared_policy: bool  # a guest_memfd has a NUMA policy of its own (Linux 6.19); otherwise populate places its pages
    conversion: bool  # the guest_memfd itself can be converted between private and shared
    simulated: bool  # the guest_memfds that it creates are stand-ins
    guest_counter: str  # the field of /proc/meminfo that counts them
    page_size = PAGE_SIZE  # bytes

    # -- what each does in its own way

    @abstractmethod
    def create_guest_memfd(self, size: int, flags: int) -> int:
        """Create a guest_memfd of fixed size; return its fd, which the caller owns; CLOEXEC is set.

        EINVAL: size 0, not a multiple of the page size or not below 2^63, or a flag outside `guest_memfd_flags`.
        ENOTTY: no guest_memfd.
        """

    @abstractmethod
    def probe(self) -> Mapping[str, int | str]:
        """Try every item for real and return the outcomes, as `gmemctl doctor` shows them."""

    def convert(self, fd: int, offset: int, size: int, parts: Sequence[tuple[int, int]], *, private: bool) -> None:
        """Make a checked range of a guest_memfd private or shared; `parts` are (offset, bytes) of what changes.

        If the kernel itself converts (`conversion`), it does so; otherwise the bytes are only removed from the view of
        holders. Either way the content of the parts is zero afterwards. PageInUse, or the kernel's errno.
        """
        for start, length in parts:
            self.punch_hole(fd, start, length)

    @abstractmethod
    def check_mapping(self, fd: int, *, shared: bool) -> None:
        """Raise for a mapping that this kernel refuses although mmap(2) would create it."""

    @abstractmethod
    def close(self) -> None:
        """Close the kernel's own fds; memory that was created lives on with its holders."""

    # -- what all do alike

    resident = staticmethod(residency.resident)
    resident_ranges = staticmethod(residency.resident_ranges)
    set_policy = staticmethod(numa.set_policy)
    policy_for_thread = staticmethod(numa.policy_for_thread)
    huge_pools = staticmethod(hugepages.huge_pools)
    seals = staticmethod(syscalls.seals)
    file_page_size = staticmethod(backing.page_size)
    populate = staticmethod(populate.populate)
    memfd_create = staticmethod(standin.memfd_create)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size in bytes; EINVAL from 2^63 on, for negative sizes, and for unaligned ones on huge pages."""
        if size > uapi.OFFSET_MAX:
            raise refuse(errno.EINVAL)
        os.ftruncate(fd, size)

    def seal(self, fd: int, seals: int) -> None:
        """Add seals (uapi.F_SEAL_*) to a memfd; EPERM when sealed against that, EINVAL when it is not a memfd."""
        fcntl.fcntl(fd, uapi.F_ADD_SEALS, seals)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Allocate the pages of a range inside the size, in one step; existing pages stay.

        May take long. EINVAL: unaligned, empty, negative or past the size. EFBIG: past 2^63. ENOSPC: no more huge
        pages. Not atomic: after a failure a part may stay. `populate` checks first, works in steps and undoes them.
        """
        check_inside(offset, size, os.fstat(fd).st_size)
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE, offset, size)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        """Free the pages of a range; it then reads as zeros. At and past the end nothing happens.

        EINVAL: unaligned, empty or negative. EFBIG: past 2^63. EPERM: sealed against writing.
        """
        check_range(offset, size)
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, offset, size)

    def present_ranges(self, fd: int, offset: int, size: int) -> list[tuple[int, int]]:
        """[(offset, bytes)] of everything that may hold anything but zeros: what is resident or in swap, ascending.

        Where not everything can be counted, pages that were allocated and never touched are left out.
        """
        known = backing.contents(fd, offset, size)
        return residency.data_ranges(fd, offset, size) if known is None else known

    def try_map(self, fd: int | None, size: int, *, reserve: bool, offset: int = 0, writable: bool = True,
                shared: bool = True) -> None:
        """Map and unmap untouched; fd None is anonymous memory. Raises what mmap(2) raises."""
        protection = uapi.PROT_READ | (uapi.PROT_WRITE if writable else 0)
        flags = uapi.MAP_SHARED if shared else uapi.MAP_PRIVATE
        if not reserve:
            flags |= uapi.MAP_NORESERVE
        if fd is None:
            fd, flags = -1, flags | uapi.MAP_ANONYMOUS
        else:
            self.check_mapping(fd, shared=shared)
        syscalls.munmap(syscalls.mmap(size, protection, flags, fd, offset), size)

    def headroom(self) -> Headroom:
        """How much memory can still be allocated before the cgroup or the machine is full."""
        return HeadroomReader().read()

    def headrooms(self) -> list[Headroom]:
        """The machine's headroom and that of each memory cgroup with a limit, its own first."""
        return HeadroomReader().read_all()

    def check_headroom(self, size: int, fd: int | None = None) -> None:
        """Raise NoHeadroom when `size` more bytes do not fit; with an fd on huge pages, into their pool."""
        page = PAGE_SIZE if fd is None else backing.page_size(fd)
        if page == PAGE_SIZE:
            check_memory(size, HeadroomReader())
        else:
            check_pool(size, page)

    def duplicate(self, fd: int, *, readonly: bool = False) -> int:
        """Another fd of the same file, to be handed out; the caller owns it, CLOEXEC is set.

        readonly: another open file, which does not write; for memory that is sealed against writing.
        """
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) if readonly else os.dup(fd)

    def identify(self, fd: int) -> str:
        """What a descriptor is, by link, magic and seals: "guest-memfd", "memfd", "hugetlb-memfd", "file", "other"."""
        link = os.readlink(f"/proc/self/fd/{fd}")
        magic, _ = syscalls.filesystem(fd)
        is_real = magic == uapi.GUEST_MEMFD_MAGIC or link == "anon_inode:[kvm-gmem]"
        if is_real or self.is_simulated(fd):
            return "guest-memfd"
        if link.startswith(("/memfd:", standin.CARRIED)) and syscalls.seals(fd) is not None:
            return "hugetlb-memfd" if magic == uapi.HUGETLBFS_MAGIC else "memfd"
        return "file" if S_ISREG(os.fstat(fd).st_mode) else "other"

    def unusable(self, fd: int, size: int, *, frozen: bool = False) -> str:
        """Why another process's fd is not memory to read and write, as a sentence; "" when it is.

        Checks access mode, O_APPEND and seals; the rest is left to mmap(2). frozen: what is sealed against writing is
        welcome.
        """
        sealed = (syscalls.seals(fd) or 0) & (uapi.F_SEAL_WRITE | uapi.F_SEAL_FUTURE_WRITE)
        if sealed and frozen:
            return ""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if flags & os.O_PATH or flags & os.O_ACCMODE != os.O_RDWR:
            return "the descriptor was not opened for reading and writing"
        if flags & os.O_APPEND:  # pwrite(2) would append, whatever the offset
            return "the descriptor was opened for appending"
        if sealed:
            return "the memfd is sealed against writing"
        if syscalls.filesystem(fd)[0] == uapi.SECRETMEM_MAGIC:
            return "the descriptor is secret memory, which no guest can use"
        try:
            self.try_map(fd, size, reserve=False)
        except OSError as exc:
            return f"the descriptor cannot be mapped for reading and writing: {os.strerror(exc.errno or 0)}"
        return ""

    def recall(self, fd: int, flags: int, creator: str) -> None:
        """Say with which flags, and by the kernel of which name, a guest_memfd was created: in a kexec a stand-in loses
        what it is known by."""
        if creator == "simulated":
            standin.recall(fd, flags)

    def is_simulated(self, fd: int) -> bool:
        """Whether a guest_memfd is a stand-in, whichever kernel made it."""
        return standin.flags_of(fd) is not None

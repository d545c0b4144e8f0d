"""System calls missing in Python's os and fcntl, by ctypes; each raises OSError and releases the GIL.

Addresses stay inside this package. A mapping made here is never touched: a SIGBUS cannot be caught in Python.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gmemd.kernel import uapi

_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)

_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

_mmap = _libc.mmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_mmap.restype = ctypes.c_void_p

_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_fstatfs = _libc.fstatfs
_fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)

_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)

_syscall = _libc.syscall
_syscall.restype = ctypes.c_long

_M_ARENA_MAX = -8  # malloc.h

_REGIONS = 4096  # that one PAGEMAP_SCAN reports at most: 96 KiB

_Range = ctypes.c_uint64 * 2  # struct cachestat_range: off, len
_Stat = ctypes.c_uint64 * 5  # struct cachestat: cache, dirty, writeback, evicted, recently evicted


def return_free_memory() -> None:
    """Give the pages of the heap that are free back to the kernel (malloc_trim(3)), if the C library can; may block."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def share_one_heap() -> None:
    """Have all threads allocate from one heap: glibc gives each its own, and a megabyte of it stays when the thread
    ends.

    They take turns at the interpreter anyway. Other C libraries have one heap, and no mallopt(3).
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Call fallocate(2), and again after a signal: what is allocated stays and is skipped."""
    while _fallocate(fd, mode, offset, size):
        failure = _failure()
        if not isinstance(failure, InterruptedError):
            raise failure


def cachestat(fd: int, offset: int, size: int) -> int:
    """The number of resident pages in the range; size 0 is to the end (Linux 6.5)."""
    stat = _Stat()
    if _syscall(uapi.SYS_CACHESTAT, fd, _Range(offset, size), stat, 0):
        raise _failure()
    return stat[0]


def filesystem(fd: int) -> tuple[int, int]:
    """The magic number and the block size (bytes) of the file system that fd lives on (fstatfs(2))."""
    words = (ctypes.c_long * 15)()
    if _fstatfs(fd, words):
        raise _failure()
    return words[0] & 0xFFFFFFFF, words[1]


def mmap(size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    """The address of a new mapping; the caller unmaps it."""
    address = _mmap(None, size, protection, flags, fd, offset)
    if address == _MAP_FAILED:
        raise _failure()
    assert isinstance(address, int)
    return address


def munmap(address: int, size: int) -> None:
    """Unmap a mapping of mmap."""
    if _munmap(address, size):
        raise _failure()


@contextmanager
def mapped(size: int, protection: int, flags: int, fd: int, offset: int = 0) -> Iterator[int]:
    """Map during the block; yields the address, which must not be touched."""
    address = mmap(size, protection, flags, fd, offset)
    try:
        yield address
    finally:
        munmap(address, size)


def mincore(fd: int, offset: int, size: int) -> bytes:
    """A byte for each page of a range, 1 if it is in memory and was touched; size is a multiple of the page size."""
    vector = ctypes.create_string_buffer(size // os.sysconf("SC_PAGESIZE"))
    with mapped(size, uapi.PROT_NONE, uapi.MAP_SHARED | uapi.MAP_NORESERVE, fd, offset) as address:
        while _mincore(address, size, vector):
            failure = _failure()
            if failure.errno != errno.EAGAIN:
                raise failure
    return vector.raw


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Open a path below a directory, following no symbolic link on the way (openat2(2)); close-on-exec is set."""
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, mode, uapi.RESOLVE_BENEATH | uapi.RESOLVE_NO_SYMLINKS)
    name = ctypes.c_char_p(os.fsencode(path))
    while (fd := _syscall(uapi.SYS_OPENAT2, directory, name, how, ctypes.c_size_t(ctypes.sizeof(how)))) < 0:
        failure = _failure()
        if failure.errno not in (errno.EINTR, errno.EAGAIN):  # the latter: something was renamed meanwhile
            raise failure
    return int(fd)


def rename(directory: int, old: str, new: str, flags: int) -> None:
    """Rename within a directory with renameat2(2)'s flags."""
    number = uapi.SYS_RENAMEAT2.get(os.uname().machine, -1)
    if _syscall(number, directory, ctypes.c_char_p(os.fsencode(old)), directory, ctypes.c_char_p(os.fsencode(new)),
                ctypes.c_uint(flags)):
        raise _failure()


def is_same_file(pid: int, number: int, fd: int) -> bool:
    """Whether a descriptor of another process leads to the same open file as ours (kcmp(2)); EPERM: not visible."""
    found = _syscall(uapi.SYS_KCMP.get(os.uname().machine, -1), pid, os.getpid(), uapi.KCMP_FILE,
                     ctypes.c_ulong(number), ctypes.c_ulong(fd))
    if found < 0:
        raise _failure()
    return bool(found == 0)


def pagemap_scan(fd: int, start: int, end: int, flags: int, categories: int) -> tuple[list[tuple[int, int]], int]:
    """The [begin, end) of pages of all these categories in a range of addresses of the process whose pagemap fd is,
    and where the walk stopped: at the end, or earlier if there were too many (Linux 6.7)."""
    regions = (ctypes.c_uint64 * (3 * _REGIONS))()  # start, end, categories
    argument = bytearray(struct.pack(uapi.PAGEMAP_SCAN_FORMAT, 96, flags, start, end, 0, ctypes.addressof(regions),
                                     _REGIONS, 0, 0, categories, 0, categories))
    count = fcntl.ioctl(fd, uapi.PAGEMAP_SCAN, argument, True)
    walked = struct.unpack(uapi.PAGEMAP_SCAN_FORMAT, argument)[4]
    return [(regions[i], regions[i + 1]) for i in range(0, 3 * count, 3)], walked if walked > start else end


def _mempolicy_number(index: int) -> int:
    numbers = uapi.SYS_MEMPOLICY.get(os.uname().machine)
    return numbers[index] if numbers else -1  # -1: ENOSYS from the kernel


def _node_mask(nodes: Sequence[int]) -> tuple[ctypes.Array[ctypes.c_ulong] | None, int]:
    """The bit mask of nodes and the bit count for the kernel (one more than it reads)."""
    if not nodes:
        return None, 0
    bits = ctypes.sizeof(ctypes.c_ulong) * 8
    words = (ctypes.c_ulong * (max(nodes) // bits + 1))()
    for node in nodes:
        words[node // bits] |= 1 << node % bits
    return words, len(words) * bits + 1


def mbind(address: int, size: int, mode: int, nodes: Sequence[int]) -> None:
    """Set the policy of a mapping, which is the file's where the file has one (memfd, hugetlb)."""
    mask, bits = _node_mask(nodes)
    where = (ctypes.c_void_p(address), ctypes.c_ulong(size))
    if _syscall(_mempolicy_number(0), *where, ctypes.c_int(mode), mask, ctypes.c_ulong(bits), ctypes.c_uint(0)):
        raise _failure()


def set_mempolicy(mode: int, nodes: Sequence[int]) -> None:
    """Set the policy of the calling thread."""
    mask, bits = _node_mask(nodes)
    if _syscall(_mempolicy_number(1), ctypes.c_int(mode), mask, ctypes.c_ulong(bits)):
        raise _failure()


def get_mempolicy(address: int | None = None) -> tuple[int, list[int]]:
    """Mode (with its flags) and nodes of the calling thread, or of the mapping at an address."""
    mode, bits = ctypes.c_int(), 1 << 15  # the largest mask that the kernel accepts is a page of bits
    mask = (ctypes.c_ulong * (bits // 64))()
    where = (None, 0) if address is None else (ctypes.c_void_p(address), uapi.MPOL_F_ADDR)
    number = _mempolicy_number(2)
    if _syscall(number, ctypes.byref(mode), mask, ctypes.c_ulong(bits), where[0], ctypes.c_ulong(where[1])):
        raise _failure()
    nodes = [64 * i + bit for i, word in enumerate(mask) if word for bit in range(64) if word >> bit & 1]
    return mode.value, nodes


def seals(fd: int) -> int | None:
    """The seals of shared memory; None for other files. Never waits for a file server."""
    try:
        return fcntl.fcntl(fd, uapi.F_GET_SEALS)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EBADF):  # the latter: O_PATH
            raise
        return None

"""What a holder of an fd can do by itself, for tests: map and touch, bind to memslots, run a guest.

Nothing here goes through gmemd's checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import mmap
import os
import platform
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Any

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE

RW = uapi.PROT_READ | uapi.PROT_WRITE
PROT_EXEC = 0x4
MAP_FIXED = 0x10
MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25
MPOL_F_NODE = 1


def errno_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the errno that a call raises, 0 when it raises none."""
    try:
        call(*args, **kwargs)
    except OSError as exc:
        return exc.errno or 0
    return 0


def signal_of(call: Callable[[], Any]) -> int:
    """Return the number of the signal that a call ends a child process with, 0 when it ends by itself."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        call()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@contextlib.contextmanager
def mapped(fd: int, size: int, offset: int = 0, flags: int = uapi.MAP_SHARED, prot: int = RW) -> Iterator[int]:
    """Map as any holder may; gives the address."""
    with syscalls.mapped(size, prot, flags, fd, offset) as address:
        yield address


@contextlib.contextmanager
def anonymous(size: int) -> Iterator[int]:
    """Map memory of no file; gives the address."""
    with syscalls.mapped(size, RW, uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS, -1) as address:
        yield address


def madvise(address: int, size: int, advice: int) -> None:
    """Call madvise(2); MADV_POPULATE_* answer EFAULT where a touch would be SIGBUS."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def fill(address: int, byte: int, size: int) -> None:
    """Write bytes of one value to memory."""
    ctypes.memset(address, byte, size)


def look(address: int, size: int = 1) -> bytes:
    """Read memory."""
    return ctypes.string_at(address, size)


def copy(address: int, data: bytes) -> None:
    """Write bytes to memory."""
    ctypes.memmove(address, data, len(data))


def map_over(address: int, size: int, fd: int) -> None:
    """Map the file shared at exactly this address, over what is there; it goes with that."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    where = libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(size), RW, uapi.MAP_SHARED | MAP_FIXED, fd, 0)
    assert where == address, os.strerror(ctypes.get_errno())


def node_of(address: int) -> int:
    """Return the NUMA node of the page at an address that was touched."""
    node = ctypes.c_int(-1)
    libc = ctypes.CDLL(None, use_errno=True)
    number = uapi.SYS_MEMPOLICY[platform.machine()][2]
    flags = ctypes.c_ulong(MPOL_F_NODE | uapi.MPOL_F_ADDR)
    assert libc.syscall(number, ctypes.byref(node), None, ctypes.c_ulong(0), ctypes.c_void_p(address), flags) == 0
    return node.value


def write_page(fd: int, page: int, byte: int) -> None:
    """Fill one page of the file through a mapping."""
    with mapped(fd, PAGE_SIZE, page * PAGE_SIZE) as address:
        fill(address, byte, PAGE_SIZE)


def read_page(fd: int, page: int) -> bytes:
    """Return one page of the file through a mapping; a hole is allocated by that."""
    with mapped(fd, PAGE_SIZE, page * PAGE_SIZE) as address:
        return look(address, PAGE_SIZE)


def fds() -> dict[str, str]:
    """Return what this process has open, {number: link}, the directory itself apart."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own fd
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


def online_nodes() -> list[int]:
    """Return the NUMA nodes with memory."""
    with open("/sys/devices/system/node/has_memory") as file:
        parts = [part.split("-") for part in file.read().strip().split(",")]
    return [node for part in parts for node in range(int(part[0]), int(part[-1]) + 1)]


def hugepage_size() -> int:
    """Bytes of a huge page where no size is asked for."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Hugepagesize:"))


# ---- a virtual machine of the test's own -------------------------------------------------------------------

KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_SET_CPUID2 = 0x4008AE90
KVM_CAP_NR_MEMSLOTS = 10

KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2

EXIT_HLT = 5
EXIT_MMIO = 6


@contextlib.contextmanager
def new_vm() -> Iterator[tuple[int, int]]:
    """Make a VM for the time of the block; gives (kvm fd, VM fd)."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        vm = fcntl.ioctl(kvm, uapi.KVM_CREATE_VM, 0)
        try:
            yield kvm, vm
        finally:
            os.close(vm)
    finally:
        os.close(kvm)


def set_region(vm: int, slot: int, flags: int, gpa: int, size: int, address: int = 0) -> None:
    """KVM_SET_USER_MEMORY_REGION."""
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", slot, flags, gpa, size, address))


def set_region2(
    vm: int,
    slot: int,
    fd: int,
    *,
    gpa: int = 0,
    size: int = PAGE_SIZE,
    offset: int = 0,
    flags: int = uapi.KVM_MEM_GUEST_MEMFD,
    address: int = 0,
) -> None:
    """KVM_SET_USER_MEMORY_REGION2: bind a range of a guest_memfd to a slot (size 0: delete the slot)."""
    region = struct.pack("<IIQQQQII112x", slot, flags, gpa, size, address, offset, fd & 0xFFFFFFFF, 0)
    fcntl.ioctl(vm, uapi.KVM_SET_USER_MEMORY_REGION2, region)


@contextlib.contextmanager
def vcpu(kvm: int, vm: int) -> Iterator[Callable[[int], int]]:
    """Make the VM's one vCPU in real mode; gives run(address) -> exit reason."""
    with contextlib.suppress(OSError):  # some hosts want three unused pages for real mode
        fcntl.ioctl(vm, KVM_SET_TSS_ADDR, 0x7FFBD000)
    fd = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    try:
        cpuid = bytearray(struct.pack("<II", 256, 0) + bytes(40 * 256))
        fcntl.ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid, True)
        fcntl.ioctl(fd, KVM_SET_CPUID2, cpuid, True)
        with mmap.mmap(fd, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE)) as state:
            yield lambda address: _run(fd, state, address)
    finally:
        os.close(fd)


def _run(fd: int, state: mmap.mmap, address: int) -> int:
    sregs = bytearray(312)
    fcntl.ioctl(fd, KVM_GET_SREGS, sregs, True)
    struct.pack_into("<Q", sregs, 0, 0)  # cs.base, 0xffff0000 after reset
    struct.pack_into("<H", sregs, 12, 0)  # cs.selector
    fcntl.ioctl(fd, KVM_SET_SREGS, bytes(sregs))
    fcntl.ioctl(fd, KVM_SET_REGS, struct.pack("<16QQQ", *[0] * 16, address, 2))  # rip, rflags
    while errno_of(fcntl.ioctl, fd, KVM_RUN, 0):  # a signal; anything else shows in the exit reason
        if struct.unpack_from("<I", state, 8)[0] != 10:
            break
    return int(struct.unpack_from("<I", state, 8)[0])


def slots_of(vm: int) -> int:
    """Return how many memslots a VM may have."""
    return fcntl.ioctl(vm, uapi.KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS)

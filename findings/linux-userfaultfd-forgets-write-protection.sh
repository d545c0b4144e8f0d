#!/bin/sh
# A mapping registered for write protection, and then for missing pages alone, loses its protection without an error.
. "$(dirname "$0")/common"
make_tree trixie python3
mount -t proc proc "$tree/proc"
trap 'umount "$tree/proc"; rm -rf --one-file-system "$temporary"' EXIT
uname -r
chroot "$tree" python3 - <<'PYTHON'
import ctypes
import fcntl
import mmap
import os
import struct
import sys

NUMBER = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
API, REGISTER, WRITEPROTECT, SCAN = 0xC018AA3F, 0xC020AA00, 0xC018AA06, 0xC0606610
WP_SHMEM, WP_UNPOPULATED, WP_ASYNC = 1 << 12, 1 << 13, 1 << 15
MISSING, WP = 1, 2
SIZE = mmap.PAGESIZE

def modes() -> list[str]:
    """What the mapping is registered for: uw is write protection, um missing pages."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0]:
                inside = int(line.split("-")[0], 16) == address
            elif inside and line.startswith("VmFlags:"):
                return [word for word in line.split() if word in ("um", "uw")]
    return []

def register(mode: int) -> str:
    try:
        fcntl.ioctl(uffd, REGISTER, struct.pack("<4Q", address, SIZE, mode, 0))
    except OSError as exc:
        return exc.strerror
    return "OK"

memfd = os.memfd_create("memory")
os.ftruncate(memfd, SIZE)
memory = mmap.mmap(memfd, SIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
uffd = ctypes.CDLL(None, use_errno=True).syscall(NUMBER, os.O_CLOEXEC | 1)  # 1: faults in user mode only
fcntl.ioctl(uffd, API, struct.pack("<3Q", 0xAA, WP_SHMEM | WP_UNPOPULATED | WP_ASYNC, 0))
print("registered for write protection:", register(WP), modes())
fcntl.ioctl(uffd, WRITEPROTECT, struct.pack("<3Q", address, SIZE, 1))
again = register(MISSING)
print("then for missing pages:", again, modes())
sys.exit((again, modes()) != ("OK", ["um"]))
PYTHON

#!/bin/sh
# A memfd made with MFD_NOEXEC_SEAL comes back from a live update read-only, and a sparse one without its holes.
# No packaged kernel has live update. So this runs itself in the one that script/kernel-lab builds, in a quarter of an
# hour, and keeps in $KERNEL_LAB_CACHE (docs/kernel.md, "The lab"). Remove that directory to try newer packages.
set -eu
[ $# != 0 ] || exec "$(dirname "$0")/../script/kernel-lab" run -k luo --append 'kho=on liveupdate=on' \
    "findings/${0##*/}" before
exec python3 - "$1" "$(realpath "$0")" <<'PYTHON'
import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

CREATE_SESSION, RETRIEVE_SESSION, PRESERVE_FD, RETRIEVE_FD, FINISH = 0xBA00, 0xBA01, 0xBA40, 0xBA41, 0xBA42
F_GET_SEALS, REBOOT_KEXEC = 1034, 0x45584543
MFD_NOEXEC_SEAL, SIZE = 8, 64 << 20
# in the second kernel, which has no initramfs
AFTER = f"""#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
exec >/dev/ttyS1 2>&1; stty raw </dev/ttyS1
{sys.argv[2]} after; echo $? >/dev/ttyS2; reboot -f
"""

def session(device: int, request: int) -> int:
    argument = bytearray(struct.pack("Ii64s", 72, -1, b"finding"))
    fcntl.ioctl(device, request, argument)
    return struct.unpack_from("i", argument, 4)[0]

def tell(name: str, fd: int) -> tuple[bool, int]:
    """Print what a memfd is; whether it can be mapped writable, and its blocks of 512 bytes."""
    status = os.fstat(fd)
    try:
        mmap.mmap(fd, SIZE).close()
        writable = True
    except PermissionError:
        writable = False
    print(f"{name}: mode {status.st_mode & 0o777:o}, seals {fcntl.fcntl(fd, F_GET_SEALS):#x},"
          f" {status.st_blocks * 512 >> 20} of {SIZE >> 20} MiB allocated, {'writable' if writable else 'read-only'},"
          f" begins {os.pread(fd, 5, 0)!r}", flush=True)
    return writable, status.st_blocks

def before() -> None:
    print(f"Linux {os.uname().release}, before the kexec")
    opened = session(os.open("/dev/liveupdate", os.O_RDWR), CREATE_SESSION)
    for token, flags in enumerate((0, MFD_NOEXEC_SEAL)):
        fd = os.memfd_create("memory", flags)
        os.ftruncate(fd, SIZE)
        os.pwrite(fd, b"hello", 0)
        tell("MFD_NOEXEC_SEAL" if flags else "plain", fd)
        fcntl.ioctl(opened, PRESERVE_FD, struct.pack("IiQ", 16, fd, token))
    Path("/lab/after").write_text(AFTER)
    os.chmod("/lab/after", 0o755)
    line = Path("/proc/cmdline").read_text().strip() + " init=/lab/after"
    subprocess.run(["kexec", "-s", "-l", "/boot/bzImage", f"--command-line={line}"], check=True)
    os.sync()
    ctypes.CDLL(None).reboot(REBOOT_KEXEC)
    sys.exit("no kexec")

def after() -> bool:
    print("after")
    opened = session(os.open("/dev/liveupdate", os.O_RDWR), RETRIEVE_SESSION)
    seen = []
    for token, name in enumerate(("plain", "MFD_NOEXEC_SEAL")):
        argument = bytearray(struct.pack("IiQ", 16, -1, token))
        fcntl.ioctl(opened, RETRIEVE_FD, argument)
        seen.append(tell(name, struct.unpack_from("i", argument, 4)[0]))
    fcntl.ioctl(opened, FINISH, bytearray(struct.pack("II", 8, 0)))
    return seen == [(True, SIZE // 512), (False, SIZE // 512)]

if sys.argv[1] == "before":
    before()
sys.exit(not after())
PYTHON

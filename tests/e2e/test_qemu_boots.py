"""A real QEMU boots with its RAM from gmemd; the RAM outlives QEMU."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.programs import gmemctl, needs

pytestmark = [pytest.mark.e2e, needs("qemu-system-x86_64")]

BOOT = 60.0  # seconds; about one, without other load

# Looks for a mark at 0x90000, where the firmware clears nothing; puts it there if missing; says which.
BOOT_SECTOR = bytes.fromhex(
    "b80090"              # 7c00        mov ax, 0x9000
    "8ed8"                # 7c03        mov ds, ax
    "66813e0000474d454d"  # 7c05        cmp dword [0], 'GMEM'
    "740d"                # 7c0e        je found
    "66c7060000474d454d"  # 7c10        mov dword [0], 'GMEM'
    "b057"                # 7c19        mov al, 'W'
    "eb02"                # 7c1b        jmp say
    "b046"                # 7c1d found: mov al, 'F'
    "e6e9"                # 7c1f say:   out 0xe9, al
    "f4"                  # 7c21 halt:  hlt
    "ebfd"                # 7c22        jmp halt
).ljust(510, b"\0") + b"\x55\xaa"


@contextmanager
def qemu(daemon: Daemon, disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A QEMU with the memory of object ram0, killed without warning in the end."""
    process = subprocess.Popen(
        gmemctl("--socket", str(daemon.sock), "exec", "ram0", "--",
                "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none",
                "-debugcon", "stdio",
                "-object", "memory-backend-file,id=ram,size=64M,share=on,mem-path={ram0}",
                "-machine", "pc,memory-backend=ram", "-m", "64M", "-drive", f"file={disk},format=raw,if=ide"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for the next byte that the guest says."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], BOOT)[0], "the guest says nothing"
    return os.read(process.stdout.fileno(), 1)


def test_ram_outlives_qemu(daemon: Daemon, tmp_path: Path) -> None:
    """What a guest wrote is there when, after a SIGKILL, the next QEMU boots on the same memory."""
    disk = tmp_path / "disk"
    disk.write_bytes(BOOT_SECTOR)
    with daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 64 << 20})
    with qemu(daemon, disk) as first:
        assert said(first) == b"W"  # written
    with qemu(daemon, disk) as second:
        assert said(second) == b"F"  # found

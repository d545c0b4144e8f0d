"""A real QEMU boots with its RAM from gmemd; the RAM outlives QEMU, and a guest can go on in another one."""

from __future__ import annotations

import mmap
import os
import select
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.e2e.test_docs import blocks, user_environment
from tests.guests.firmware import FIRMWARE
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, gmemctl, needs

pytestmark = [pytest.mark.e2e, needs("qemu-system-x86_64")]

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
    assert select.select([process.stdout], [], [], PATIENCE)[0], "the guest says nothing"
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


def test_a_guest_goes_on_in_another_qemu(tmp_path: Path) -> None:
    """The blocks of docs/qemu.md, as they stand there: the second QEMU goes on where the first one was."""
    start, replace = (text.replace("/tmp/", f"{tmp_path}/") for word, text in blocks(ROOT / "docs/qemu.md")
                      if word == "replace")
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "vm1", "size": 64 << 20})
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "vm1"})
        with mmap.mmap(fd, 64 << 20) as memory:
            os.close(fd)

            def guest() -> tuple[int, int]:
                starts, count = struct.unpack_from("<II", memory, 0x1000)
                return starts, count

            def qemus() -> list[int]:
                return [one["pid"] for one in client.execute("query-memdev-holders", {"id": "vm1"})
                        if one["mapped"] and one["pid"] != os.getpid()]

            def runs() -> bool:
                before = guest()
                time.sleep(0.01)
                return before[1] != 0 and guest() != before

            with subprocess.Popen(["bash", "-eu"], stdin=subprocess.PIPE, text=True, start_new_session=True,
                                  env=guest_is_firmware(tmp_path, daemon)) as shell:
                assert shell.stdin is not None
                try:
                    shell.stdin.write(start)
                    shell.stdin.flush()
                    wait_for(runs)
                    shell.stdin.write(f"{replace}touch {tmp_path}/done\n")
                    shell.stdin.flush()
                    wait_for(lambda: shell.poll() is not None or (tmp_path / "done").exists())
                    assert shell.poll() is None
                    assert len(qemus()) == 1
                    wait_for(runs)
                    assert guest()[0] == 1
                    [status] = client.execute("query-memdev-status")
                    assert (status["generation"], [status["runner"]["pid"]]) == (2, qemus())
                finally:
                    for pid in qemus():
                        os.kill(pid, signal.SIGKILL)
                    os.killpg(shell.pid, signal.SIGKILL)


def guest_is_firmware(directory: Path, daemon: Daemon) -> dict[str, str]:
    """An environment where every QEMU has our firmware."""
    (directory / "firmware").write_bytes(FIRMWARE)
    made = user_environment(directory, daemon)
    program = directory / "bin" / "qemu-system-x86_64"
    qemu = shutil.which("qemu-system-x86_64")
    program.write_text(f'#!/bin/sh\nexec {qemu} "$@" -accel tcg -bios {directory}/firmware\n')
    program.chmod(0o755)
    return made

"""The last step of `gmemd demo`: a guest goes on in another QEMU, where one is installed.

The guest is a firmware of a few instructions: it counts the starts of the machine in its memory, then counts in a
register of the processor forever. So a guest that was only started again on the same memory would be found out twice.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gmemd.client.client import Client
from gmemd.client.running import PATIENCE, state
from gmemd.errors import QmpError
from gmemd.posix.sockets import written

PROGRAM = "qemu-system-x86_64"
SIZE = 64 << 20  # bytes of the object
STARTS, COUNT = 0x1000, 0x1004  # guest-physical addresses of two numbers, 32 bits each
FIRMWARE = bytes.fromhex(
    "31c0"        # f0000       xor ax, ax
    "8ed8"        # f0002       mov ds, ax
    "66ff060010"  # f0004       inc dword [STARTS]
    "6631db"      # f0009       xor ebx, ebx
    "6643"        # f000c next: inc ebx
    "66891e0410"  # f000e       mov [COUNT], ebx
    "31c9"        # f0013       xor cx, cx
    "e2fe"        # f0015       loop $        65,536 times
    "ebf3"        # f0017       jmp next
).ljust(0xfff0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0")  # ffff0 jmp 0xf000:0


def command(firmware: Path, memory: str, socket: Path) -> list[str]:
    """The words of a QEMU that runs the guest on `memory`, an object's path or placeholder, and has a QMP socket."""
    return [PROGRAM, "-nodefaults", "-display", "none", "-accel", "tcg", "-bios", str(firmware), "-m", "64M",
            "-object", f"memory-backend-file,id=ram,size=64M,share=on,mem-path={memory}",
            "-machine", "pc,memory-backend=ram", "-qmp", f"{written(str(socket))},server=on,wait=off"]


def guest(memory: mmap.mmap) -> tuple[int, int]:
    """How often the guest was started, and how far it has counted."""
    return (*struct.unpack_from("<I", memory, STARTS), *struct.unpack_from("<I", memory, COUNT))


class Moved:
    """A guest that is moved from one QEMU to another; `close` ends it."""

    def __init__(self, socket: str, directory: Path) -> None:
        """`socket`: of the gmemd that owns its memory. Its files go into `directory`."""
        self.pids: list[int] = []  # the QEMUs, in order
        self.before = self.after = 0  # how far it had counted before it was moved, and afterwards
        self._socket, self._directory = socket, directory

    def run(self) -> None:
        """Start it, and move it; SystemExit if that fails."""
        (self._directory / "firmware").write_bytes(FIRMWARE)
        with Client(self._socket, timeout=PATIENCE) as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "vm0", "size": SIZE})
            _, [fd] = client.execute_fds("memdev-get-fd", {"id": "vm0"})
        with mmap.mmap(fd, SIZE) as memory:
            os.close(fd)
            first = subprocess.Popen(self._gmemctl("exec", "vm0", "--", *self._qemu("old")), start_new_session=True)
            self.pids.append(first.pid)
            self.before = self._wait_counting(memory)
            done = subprocess.run(
                self._gmemctl("-o", "json", "replace", "vm0", "--qmp", str(self._directory / "old.sock"), "--",
                              *self._qemu("new")), capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"the guest was not moved: {done.stderr.strip()}")
            self.pids.append(json.loads(done.stdout)["pid"])
            first.wait(PATIENCE)
            self.after = self._wait_counting(memory, self.before)
            if (starts := guest(memory)[0]) != 1:
                sys.exit(f"the guest was started {starts} times")

    def _gmemctl(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "gmemd.cli.gmemctl", "--socket", self._socket, *words]

    def _qemu(self, name: str) -> list[str]:
        return command(self._directory / "firmware", "{vm0}", self._directory / f"{name}.sock")

    def _wait_counting(self, memory: mmap.mmap, least: int = 0) -> int:
        """Wait until the guest counts, beyond `least`; the number."""
        end = time.monotonic() + PATIENCE
        before = guest(memory)[1]
        while (count := guest(memory)[1]) <= max(before, least):
            if time.monotonic() > end:
                sys.exit("the guest in QEMU does not count")
            time.sleep(0.005)
        return count

    def close(self) -> None:
        """End what still runs of it, and delete its memory."""
        end = time.monotonic() + PATIENCE
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            while state(pid) not in "ZX" and time.monotonic() < end:
                time.sleep(0.005)
        with suppress(QmpError, OSError), Client(self._socket, timeout=PATIENCE) as client:
            client.execute("memdev-delete", {"id": "vm0", "force": True})

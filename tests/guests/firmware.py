"""The smallest guest: firmware that counts its starts, then counts forever, in memory that the test has mapped too."""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

from tests.patience import wait_for

SIZE = 64 << 20  # bytes of its RAM

# Counts the starts at 0x1000; then counts in a register forever, and stores it at 0x1004.
FIRMWARE = bytes.fromhex(
    "31c0"        # f0000       xor ax, ax
    "8ed8"        # f0002       mov ds, ax
    "66ff060010"  # f0004       inc dword [0x1000]
    "6631db"      # f0009       xor ebx, ebx
    "6643"        # f000c next: inc ebx
    "66891e0410"  # f000e       mov [0x1004], ebx
    "ebf7"        # f0013       jmp next
).ljust(0xfff0, b"\0") + bytes.fromhex("ea000000f0").ljust(16, b"\0")  # ffff0 jmp 0xf000:0


class FirmwareGuest:
    """That guest; its files are in `directory`."""

    def __init__(self, directory: Path, fd: int, id_: str = "ram0") -> None:
        """`fd`: its RAM, borrowed; `id_`: the object's id in commands."""
        self.directory = directory
        self.memory = mmap.mmap(fd, SIZE)
        self._id = id_
        self.bios = directory / "firmware"
        self.bios.write_bytes(FIRMWARE)

    def qmp(self, name: str) -> Path:
        """The QMP socket of the QEMU of that name."""
        return self.directory / f"{name}.qmp"

    def command(self, name: str, *more: str, memory: str = "", machine: str = "pc-i440fx-7.2",
                qmp: bool = True) -> list[str]:
        """The words of a QEMU with its RAM in the file `memory`, by default in the object."""
        memory = memory or f"{{{self._id}}}"
        return ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-vga", "none",
                "-accel", "tcg,tb-size=4", "-bios", str(self.bios), "-m", "64M",
                "-object", f"memory-backend-file,id=ram,size=64M,share=on,mem-path={memory}",
                "-machine", f"{machine},memory-backend=ram",
                *(("-qmp", f"unix:{self.qmp(name)},server=on,wait=off") if qmp else ()), *more]

    @property
    def starts(self) -> int:
        """How often it was started."""
        return int(struct.unpack_from("<I", self.memory, 0x1000)[0])

    @property
    def count(self) -> int:
        """Where it is."""
        return int(struct.unpack_from("<I", self.memory, 0x1004)[0])

    def runs(self, seconds: float = 0.2) -> bool:
        """Whether it counts: at once, or in that time, because QEMU may be waiting for a CPU."""
        before, end = self.count, time.monotonic() + seconds
        while self.count == before and time.monotonic() < end:
            time.sleep(0.005)
        return self.count != before

    def wait_runs(self) -> None:
        wait_for(self.runs)
        assert self.starts == 1, "it was started again"

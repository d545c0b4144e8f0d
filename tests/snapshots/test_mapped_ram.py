"""A migration file of QEMU with mapped-ram is imported byte for byte.

The file is written here as QEMU 11.1.3 writes it; Debian 12's QEMU cannot write one.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.snapshots.mapped_ram import Block, blocks
from tests.snapshots.engine import MEMBERS, MIB, PAGE, contents, do, memfd, restore, running

HEAD = b"QEVM\0\0\0\3" + b"\7\0\0\0\x0bpc-q35-11.1" + b"\1\0\0\0\2"


def migration(path: Path, memory: dict[str, bytes], stale: int = -1) -> None:
    """A file with these blocks; page `stale` of each has bytes that its bitmap does not know."""
    with path.open("wb") as file:
        file.write(HEAD + b"\3ram" + struct.pack(">IIQ", 0, 4, sum(map(len, memory.values())) | 4))
        for name, data in memory.items():
            bits = bytearray(len(data) // PAGE // 8 or 8)
            for page in range(len(data) // PAGE):
                if any(data[page * PAGE:(page + 1) * PAGE]):
                    bits[page // 8] |= 1 << page % 8
            bitmap = file.tell() + 1 + len(name) + 36
            pages = bitmap + len(bits) + -(bitmap + len(bits)) % MIB
            file.write(bytes([len(name)]) + name.encode() + struct.pack(">QIQQQ", len(data), 1, PAGE, bitmap, pages))
            file.write(bits)
            file.seek(pages)
            file.write(data)
            if stale >= 0:
                file.seek(pages + stale * PAGE)
                file.write(b"stale")
            file.seek(pages + len(data))
        file.write(b"devices")


def imported(root: Path, path: Path, **more: str) -> dict[str, object]:
    fd = os.open(path, os.O_RDONLY)
    try:
        with running("import", {"name": "q", "file": fd, "members": MEMBERS, **more}, root, [fd]) as engine:
            return engine.heard("end")
    finally:
        os.close(fd)


def test_byte_for_byte(tmp_path: Path) -> None:
    """The largest block unless another one is named; what the bitmap does not know is zeros."""
    ram = bytearray(18 * MIB)
    ram[5 * PAGE:7 * PAGE] = os.urandom(2 * PAGE)
    ram[-3:] = b"end"
    vga = bytes(PAGE) + b"vga".ljust(7 * PAGE)
    migration(tmp_path / "file", {"vga.vram": vga, "pc.ram": bytes(ram)}, stale=100)
    (tmp_path / "root").mkdir()
    root = tmp_path / "root"
    assert imported(root, tmp_path / "file")["block"] == "pc.ram"
    assert (root / "q" / "memory.raw").read_bytes() == ram
    do("verify", root, "q")
    target = memfd(len(ram))
    restore(root, "q", target)
    assert contents(target) == ram
    os.close(target)
    (root / "q").rename(root / "p")
    assert imported(root, tmp_path / "file", block="vga.vram")["size"] == len(vga)
    assert (root / "q" / "memory.raw").read_bytes() == vga


def test_what_is_not_one_is_named(tmp_path: Path) -> None:
    """Another file, one without the capability, one cut short, one of several: a sentence, and nothing left."""
    path, root = tmp_path / "file", tmp_path / "root"
    root.mkdir()

    def refused(**more: str) -> str:
        with pytest.raises(QmpError) as refusal:
            imported(root, path, **more)
        assert os.listdir(root) == []
        return refusal.value.desc

    path.write_bytes(b"\x7fELF")
    assert refused() == "the file is not a migration file of QEMU"
    path.write_bytes(HEAD)
    assert refused() == "QEMU's file has no section 'ram'"
    path.write_bytes(HEAD + b"\3ram" + struct.pack(">IIQ", 0, 4, MIB | 4) + b"\6pc.ram" + struct.pack(">Q", MIB)
                     + struct.pack(">Q", 8) + bytes(30))
    assert refused().startswith("QEMU's file was not written with mapped-ram")
    migration(path, {"a": bytes(PAGE * 8), "b": b"b" * PAGE * 8})
    assert refused() == "QEMU's file has several blocks of that size: say which of 'a', 'b'"
    assert refused(block="c") == "QEMU's file has no block 'c', but 'a', 'b'"
    whole = path.read_bytes()
    fd = os.open(path, os.O_RDWR)
    for length in range(len(HEAD) + 60):
        os.ftruncate(fd, 0)
        os.pwrite(fd, whole[:length], 0)
        with pytest.raises(QmpError, match="file"):
            blocks(fd)
    os.pwrite(fd, whole, 0)
    assert [block.name for block in blocks(fd)] == ["a", "b"]
    assert blocks(fd)[1] == Block("b", 8 * PAGE, MIB + 8 * PAGE + 38, 2 * MIB)
    os.truncate(path, 2 * MIB + PAGE)
    assert refused(block="b") == "cannot read QEMU's file: No data available"
    os.close(fd)

"""The memory in a migration file of QEMU with the capability mapped-ram (QEMU 9.0), as a Source.

QEMU's docs/devel/migration/mapped-ram.rst and migration/ram.c: the section "ram" begins with the sum of all block
sizes, then for each block its name, its size and a header that says where its bitmap and its pages lie; the next block
follows on these. A page whose bit is clear is zeros, whatever the file holds there. Everything is big-endian but the
bitmap, whose first page is the lowest bit of the first byte.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from gmemd.errors import QmpError, os_errors
from gmemd.snapshots.folder import check_name, draft
from gmemd.snapshots.pages import BLOCK, PAGE, WINDOW, from_bits, runs
from gmemd.snapshots.save import Message, Saving, Talk, progress
from gmemd.snapshots.tables import read_exactly

_MAGIC: Final = b"QEVM\0\0\0\3"  # QEMU_VM_FILE_MAGIC and its version
_SECTION: Final = b"\3ram" + struct.pack(">II", 0, 4)  # name, instance, version
_MEM_SIZE: Final = 0x04  # RAM_SAVE_FLAG_MEM_SIZE, in the low bits of the sum
_LOOKED_AT: Final = 4 << 20  # bytes of the file's beginning; what is before the section "ram" is small
_HEADER: Final = struct.Struct(">IQQQ")  # version, page size, offset of the bitmap, offset of the pages
_WORD: Final = struct.Struct(">Q")


class Block(NamedTuple):
    """One block of guest memory in the file."""

    name: str
    size: int  # bytes
    bitmap: int  # offset in the file
    pages: int  # offset in the file


class MappedRam:
    """A block of such a file; borrows the descriptor."""

    def __init__(self, fd: int, block: Block) -> None:
        self._fd, self._block = fd, block
        self.size = block.size

    def total(self) -> int:
        return sum(WINDOW for _ in self.windows())

    def windows(self) -> Iterator[int]:
        for window in range(-(-self.size // WINDOW)):
            if any(self._mask(window * WINDOW, min(WINDOW, self.size - window * WINDOW))):
                yield window

    def blocks(self, window: int) -> set[int]:
        mask = self._mask(window * WINDOW, min(WINDOW, self.size - window * WINDOW))
        return {block for start, count in runs(mask)
                for block in range(start // BLOCK, (start + count - 1) // BLOCK + 1)}

    def read(self, at: int, view: memoryview) -> None:
        mask = self._mask(at, len(view))
        view[:] = bytes(len(view))
        with os_errors("cannot read QEMU's file"):
            for start, count in runs(mask):
                read_exactly(self._fd, view[start:start + count], self._block.pages + at + start)

    def _mask(self, at: int, count: int) -> bytearray:
        bits = bytearray(-(-count // PAGE // 8))
        with os_errors("cannot read QEMU's file"):
            read_exactly(self._fd, memoryview(bits), self._block.bitmap + at // PAGE // 8)
        return from_bits(bits, count // PAGE)


def blocks(fd: int) -> list[Block]:
    """The blocks of a file; QmpError if it is not one with mapped-ram."""
    with os_errors("cannot read QEMU's file"):
        begin, end = os.pread(fd, _LOOKED_AT, 0), os.fstat(fd).st_size
    if not begin.startswith(_MAGIC):
        raise QmpError("the file is not a migration file of QEMU")
    at = begin.find(_SECTION)
    if at < 0:
        raise QmpError("QEMU's file has no section 'ram'")
    at, found = at + len(_SECTION) + _WORD.size, list[Block]()
    total = _WORD.unpack(_take(fd, _WORD.size, at - _WORD.size))[0]
    if total & PAGE - 1 != _MEM_SIZE:
        raise QmpError("QEMU's file has a section 'ram' of an unknown form")
    total -= _MEM_SIZE
    while total > 0:
        found.append(_block(fd, at, end))
        at, total = found[-1].pages + found[-1].size, total - found[-1].size
    return found


def _block(fd: int, at: int, end: int) -> Block:
    length = _take(fd, 1, at)[0]
    name = _take(fd, length, at + 1).decode(errors="replace")
    at += 1 + length
    size = _WORD.unpack(_take(fd, _WORD.size, at))[0]
    version, page, bitmap, pages = _HEADER.unpack(_take(fd, _HEADER.size, at + _WORD.size))
    if version != 1 or page != PAGE or not size or size % PAGE:
        raise QmpError("QEMU's file was not written with mapped-ram, or for pages of another size")
    if bitmap + size // PAGE // 8 > end or not at < pages < 1 << 62 or size >= 1 << 62:
        raise QmpError(f"QEMU's file ends before the memory of '{name}'")
    return Block(name, size, bitmap, pages)


def _take(fd: int, count: int, at: int) -> bytes:
    with os_errors("cannot read QEMU's file"):
        data = os.pread(fd, count, at)
    if len(data) < count:
        raise QmpError("QEMU's file ends within its section 'ram'")
    return data


def choose(fd: int, name: str | None) -> Block:
    """The block of that name; without a name, the largest one."""
    found = blocks(fd)
    names = ", ".join(f"'{block.name}'" for block in found)
    if name is not None:
        found = [block for block in found if block.name == name]
        if not found:
            raise QmpError(f"QEMU's file has no block '{name}', but {names}")
    largest = max(found, key=lambda block: block.size)
    if [block.size for block in found].count(largest.size) > 1:
        raise QmpError(f"QEMU's file has several blocks of that size: say which of {names}")
    return largest


def import_(spec: Message) -> Talk:
    """Make a snapshot of guest memory in QEMU's file.

    {"root": fd, "name", "file": fd, "block": name?, "members": {the manifest's}}; says {"total"} and {"done"}, and at
    the end {"id", "bytes", "size": bytes of the memory, "block": name}.
    """
    name = spec["name"]
    check_name(name)
    block = choose(spec["file"], spec.get("block"))
    source = MappedRam(spec["file"], block)
    with contextlib.ExitStack() as opened:
        with os_errors(f"cannot create snapshot '{name}'"):
            made = opened.enter_context(draft(spec["root"], name))
        saving = Saving(made, name, block.size)
        opened.callback(saving.close)
        saving.add("memory", source)
        yield {"total": saving.total()}
        yield from progress(saving.take(None), 0)
        size = saving.finish(spec["members"])
        with os_errors(f"cannot publish snapshot '{name}'"):
            made.publish()
    return {"id": saving.id, "bytes": size, "size": block.size, "block": block.name}


VERBS: Final = {"import": import_}

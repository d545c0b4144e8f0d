"""memory.zst, the compressed form: a zstd frame for each 64 KiB block that is not zeros, and a table of the frames.

The file is in Zstandard's seekable format: the frames follow each other, and a skippable frame at the end holds the
sizes of each, compressed and not. Which block a frame is follows from the digests: the n-th frame is the n-th block
whose digest is not zero. Every frame stands alone, so any block can be read without those before it, and a flipped bit
costs one block.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator
from typing import Any, Final

from xxhash import xxh3_128_digest

from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots import manifest
from gmemd.snapshots.buffers import Buffers
from gmemd.snapshots.pages import BLOCK, CHUNK, NOTHING, PAGE, WINDOW, filled, pieces
from gmemd.snapshots.source import Source
from gmemd.snapshots.tables import Tables, read_exactly, sha256_of, write_fully

_LEVEL: Final = 1  # higher ones take twice the time for two percent
_SKIPPABLE: Final = 0x184D2A5E
_SEEKABLE: Final = 0x8F92EAB1
_HEADER: Final = struct.Struct("<II")  # magic, bytes that follow
_ENTRY: Final = struct.Struct("<II")  # bytes compressed, and not
_FOOTER: Final = struct.Struct("<IBI")  # frames, descriptor, magic


def zstd() -> Any:
    """The module with ZstdCompressor; QmpError where there is none."""
    try:
        from compression import zstd as found  # from Python 3.14 on
    except ImportError:
        try:
            import backports.zstd as found
        except ImportError:
            raise QmpError("compressed snapshots need the Python package backports.zstd") from None
    return found


class Frames:
    """The frames of a memory.zst; borrows its descriptor and the tables."""

    def __init__(self, fd: int, tables: Tables, name: str, file: str) -> None:
        self._fd, self._tables, self._name, self._file = fd, tables, name, file
        self._zstd = zstd()
        end = os.fstat(fd).st_size
        footer = self._take(_FOOTER, end - _FOOTER.size)
        self._table = end - _FOOTER.size - footer[0] * _ENTRY.size
        header = self._take(_HEADER, self._table - _HEADER.size)
        if (footer[1:], header) != ((0, _SEEKABLE), (_SKIPPABLE, end - self._table)):
            raise self._wrong("its table of frames is not one")
        self._starts: dict[int, tuple[int, int]] = {}  # window -> number and offset of its first frame
        number = at = 0
        for window in tables.windows():
            self._starts[window] = number, at
            count = len(tables.blocks(window))
            at += sum(size for size, _ in self._entries(number, count))
            number += count
        if (number, at) != (footer[0], self._table - _HEADER.size):
            raise self._wrong("its table has other frames than the digests")

    def read(self, at: int, view: memoryview) -> None:
        """Fill a buffer, inside one window, with blocks; those without a frame are zeros."""
        view[:] = bytes(len(view))
        blocks = sorted(self._tables.blocks(at // WINDOW))
        if not blocks:
            return
        number, place = self._starts[at // WINDOW]
        for block, (size, length) in zip(blocks, self._entries(number, len(blocks)), strict=True):
            start = at // WINDOW * WINDOW + block * BLOCK - at
            if 0 <= start < len(view):
                view[start:start + length] = self._frame(place, size, min(BLOCK, len(view) - start), length)
            place += size

    def _frame(self, at: int, size: int, want: int, length: int) -> bytes:
        data = bytearray(size)
        read_exactly(self._fd, memoryview(data), at)
        try:
            block: bytes = self._zstd.ZstdDecompressor().decompress(data, max_length=BLOCK + 1)
        except self._zstd.ZstdError as exc:
            raise self._wrong(f"the frame at {at} cannot be decompressed") from exc
        if not len(block) == length == want:
            raise self._wrong(f"the frame at {at} holds {len(block)} bytes instead of {want}")
        return block

    def _entries(self, number: int, count: int) -> list[tuple[int, int]]:
        """(compressed, plain) sizes of frames."""
        data = bytearray(count * _ENTRY.size)
        if number * _ENTRY.size + len(data) > os.fstat(self._fd).st_size - self._table - _FOOTER.size:
            raise self._wrong("its table is too short")
        read_exactly(self._fd, memoryview(data), self._table + number * _ENTRY.size)
        return list(_ENTRY.iter_unpack(data))

    def _take(self, form: struct.Struct, at: int) -> tuple[Any, ...]:
        if at < 0:
            raise self._wrong("it is too short")
        data = bytearray(form.size)
        read_exactly(self._fd, memoryview(data), at)
        return form.unpack(data)

    def _wrong(self, what: str) -> QmpError:
        return manifest.damaged(self._name, f"{self._file}: {what}")


class ColdHalf:
    """The writer of a compressed part of a draft; owns the descriptors of its files."""

    stored = "cold"

    def __init__(self, folder: int, part: str, names: tuple[str, str], size: int, what: str) -> None:
        self._what, self._zstd, self.file = f"cannot write snapshot '{what}'", zstd(), f"{part}.zst"
        self._sizes, self._at, self._gathered = array("I"), 0, bytearray()
        with os_errors(self._what):
            self._tables = Tables(folder, *names, size, create=True)
            try:
                self._fd = open_beneath(folder, self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:
                self._tables.close()
                raise

    def close(self) -> None:
        """Close the files."""
        self._tables.close()
        close_fd(self._fd)

    def take(self, source: Source, dirty: object = None, *, again: bool = False) -> Iterator[int]:
        """Compress all; yields the bytes that were read, as it goes. There is one pass."""
        with Buffers() as buffers:
            for window in source.windows():
                yield self._window(window, source, buffers)
        with os_errors(self._what):
            self._end()

    def finish(self) -> dict[str, Any]:
        """Make it durable; its entry in the manifest."""
        with os_errors(self._what):
            os.fdatasync(self._fd)
            self._tables.sync()
            stat = os.fstat(self._fd)
            return {"file": self.file, "stored": self.stored, "bytes": stat.st_blocks * 512,
                    **self._tables.hashes(), "file-sha256": sha256_of(self._fd, stat.st_size)}

    def _window(self, window: int, source: Source, buffers: Buffers) -> int:
        with os_errors(self._what):
            digests, mask = self._tables.read(window)
        length, count = min(WINDOW, source.size - window * WINDOW), 0
        for start, end in pieces(length, source.blocks(window)):
            view = buffers.data[:end - start]
            count += len(view)
            source.read(window * WINDOW + start, view)
            pages = filled(view)
            mask[start // PAGE:(start + len(view)) // PAGE] = pages
            for at in range(0, len(view), BLOCK):
                if pages.find(1, at // PAGE, (at + BLOCK) // PAGE) >= 0:
                    number = (start + at) // BLOCK * len(NOTHING)
                    digests[number:number + len(NOTHING)] = xxh3_128_digest(view[at:at + BLOCK])
                    self._append(view[at:at + BLOCK])
        with os_errors(self._what):
            self._tables.write(window, digests, mask)
        return count

    def _append(self, block: memoryview) -> None:
        compressor = self._zstd.ZstdCompressor(level=_LEVEL)
        frame = compressor.compress(block, mode=compressor.FLUSH_FRAME)
        self._gathered += frame
        self._sizes.extend((len(frame), len(block)))
        if len(self._gathered) >= CHUNK:
            with os_errors(self._what):
                self._flush()

    def _flush(self) -> None:
        write_fully(self._fd, memoryview(self._gathered), self._at)
        self._at += len(self._gathered)
        self._gathered = bytearray()

    def _end(self) -> None:
        if sys.byteorder == "big":
            self._sizes.byteswap()
        table = self._sizes.tobytes()
        footer = _FOOTER.pack(len(self._sizes) // 2, 0, _SEEKABLE)
        self._gathered += _HEADER.pack(_SKIPPABLE, len(table) + len(footer)) + table + footer
        self._flush()

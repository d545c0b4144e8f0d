"""The writer of one part of a draft: memory.raw or private.raw, with its map and its digests.

A part is written in passes. The tables say at any time what the file holds, so a later pass hashes what there is now
and writes only blocks whose digest differs. An increment begins with its parent's digests; so what has not changed
since then is what an earlier pass would have written.
- full: the file has the pages that are not zeros.
- reflink: a full one that began as a clone of the parent's file (FICLONE), and shares what did not change with it.
- delta: the file has the pages that differ from the parent; one that became zeros is marked in the map and a hole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from heapq import merge
from itertools import groupby
from typing import Any, Final

from xxhash import xxh3_128_digest

from gmemd.errors import close_fd, os_errors
from gmemd.kernel import syscalls, uapi
from gmemd.snapshots.buffers import Buffers
from gmemd.snapshots.crew import by_two
from gmemd.snapshots.pages import BLOCK, BLOCKS, NOTHING, PAGE, WINDOW, both, differing, filled, pieces, runs, without
from gmemd.snapshots.source import Memory, Source
from gmemd.snapshots.stored import Part, files_of
from gmemd.snapshots.tables import Tables, read_exactly, write_fully

Dirty = dict[int, set[int]]  # window -> numbers of its blocks that may have changed

_WORTH_DIRECT: Final = 128 << 10  # bytes in a row; less goes through the page cache, which gathers it


class Half:
    """One part being written; owns the descriptors of its files."""

    def __init__(self, folder: int, name: str, size: int, what: str, parent: Part | None = None, *,
                 delta: bool = True) -> None:
        self.size, self._what = size, f"cannot write snapshot '{what}'"
        self._base: Part | None = None  # of a delta
        self._again: Memory | None = None  # what more than one pass reads
        self.stored = "full"
        self.file, map_name, digests_name = files_of(name)
        with contextlib.ExitStack() as opened, os_errors(self._what):
            self._raw = syscalls.open_beneath(folder, self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            opened.callback(close_fd, self._raw)
            self._tables = Tables(folder, map_name, digests_name, size, create=True)
            opened.callback(self._tables.close)
            self._direct = _open_direct(folder, self.file)
            if self._direct >= 0:
                opened.callback(close_fd, self._direct)
            if parent is not None:
                self._begin_with(parent, delta)
            os.ftruncate(self._raw, size)
            self._open = opened.pop_all()

    def _begin_with(self, parent: Part, delta: bool) -> None:
        """Share what the parent's file has where the file system can; else be a delta, if that is allowed."""
        if parent.whole and _cloned(parent.raw, self._raw):
            self.stored = "reflink"
        elif delta:
            self.stored, self._base = "delta", parent
        else:
            return
        self._tables.copy(parent.tables, with_map=self._base is None)

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def take(self, source: Source, dirty: Dirty | None = None, *, again: bool = False) -> Iterator[int]:
        """One pass: write what has changed; yields the bytes that were read, as it goes.

        `dirty`: nothing else has changed since the last pass, or, before the first one, since the parent.
        `again`: another pass will follow, which is to be short.
        """
        if again:
            self._again = source if type(source) is Memory else None
        windows = _once(merge(source.windows(), self._tables.windows())) if dirty is None else iter(sorted(dirty))

        def work(window: int, buffers: Buffers) -> int:
            done = self._window(window, source, buffers, None if dirty is None else dirty[window])
            if again and self._again is not None:
                self._again.prepare(window)
            return done

        return by_two(windows, work)

    def finish(self) -> dict[str, Any]:
        """Make it durable; its entry in the manifest."""
        with os_errors(self._what):
            os.fdatasync(self._raw)
            self._tables.sync()
            return {"file": self.file, "stored": self.stored, "bytes": os.fstat(self._raw).st_blocks * 512,
                    **self._tables.hashes()}

    # -- one window ------------------------------------------------------------------------------------------

    def _window(self, window: int, source: Source, buffers: Buffers, blocks: set[int] | None) -> int:
        """Bring a window up to date, or only these blocks of it; how many bytes were read."""
        length = min(WINDOW, self.size - window * WINDOW)
        with os_errors(self._what):
            digests, mask = self._tables.read(window)
            if blocks is None:
                blocks = source.blocks(window) | self._tables.blocks(window)
                if self._again is not None and self._again.same(window, digests):
                    return length
        before, count = bytes(digests), 0
        for start, end in pieces(length, blocks):
            view = buffers.data[:end - start]
            source.read(window * WINDOW + start, view)
            with os_errors(self._what):
                self._piece(window * WINDOW, start, view, buffers, digests, mask)
            count += end - start
        if digests != before:
            with os_errors(self._what):
                self._tables.write(window, digests, mask)
        return count

    def _piece(self, base: int, start: int, view: memoryview, buffers: Buffers, digests: bytearray,
               mask: bytearray) -> None:
        """Write the blocks of a piece, `start` bytes into the window at `base`, whose digest has changed."""
        full = filled(view)
        write, punch = bytearray(len(full)), bytearray(len(full))
        for at in range(0, len(view), BLOCK):
            end = min(at + BLOCK, len(view))
            number, pages = (start + at) // BLOCK * len(NOTHING), slice(at // PAGE, end // PAGE)
            block = view[at:end]
            digest = xxh3_128_digest(block) if full.find(1, pages.start, pages.stop) >= 0 else NOTHING
            old = digests[number:number + len(NOTHING)]
            if digest == old:
                continue
            digests[number:number + len(NOTHING)] = digest
            place = slice((start + at) // PAGE, (start + end) // PAGE)
            changed = self._changed(base + start + at, block, buffers, full[pages])
            write[pages] = both(full[pages], changed)
            mask[place], gone = (full[pages], without(mask[place], full[pages])) if self._base is None \
                else (changed, without(mask[place], write[pages]))
            punch[pages] = gone
        for at, count in runs(write):
            self._write(view[at:at + count], base + start + at)
        for at, count in runs(punch):
            self._punch(base + start + at, count)

    def _changed(self, at: int, block: memoryview, buffers: Buffers, full: bytearray) -> bytearray:
        """The mask of the pages to be written: in a clone, those that still are as they were stay shared."""
        other = buffers.base[:len(block)]
        if self._base is not None:
            self._base.read(at, other)
        elif self.stored == "reflink":
            read_exactly(self._raw, other, at)
        else:
            return full
        return differing(block, other)

    def _write(self, view: memoryview, at: int) -> None:
        if self._direct < 0 or len(view) < _WORTH_DIRECT:
            write_fully(self._raw, view, at)
            return
        try:
            write_fully(self._direct, view, at)
        except OSError as exc:
            if exc.errno != errno.EINVAL:  # a device of larger blocks
                raise
            write_fully(self._raw, view, at)

    def _punch(self, at: int, count: int) -> None:
        """Make pages of the file holes; zeros where it cannot have any."""
        try:
            syscalls.fallocate(self._raw, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, at, count)
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            write_fully(self._raw, memoryview(bytes(count)), at)


def dirty_blocks(ranges: list[list[int]], size: int) -> Dirty:
    """The blocks in which [[offset, bytes]] lie, as far as they are below `size`."""
    found: Dirty = {}
    for offset, count in ranges:
        for block in range(offset // BLOCK, -(-min(offset + count, size) // BLOCK)):
            found.setdefault(block // BLOCKS, set()).add(block % BLOCKS)
    return found


def _once(numbers: Iterator[int]) -> Iterator[int]:
    return (number for number, _ in groupby(numbers))


def _open_direct(folder: int, file: str) -> int:
    """Another descriptor of a file, which bypasses the page cache; -1 where there is no such thing."""
    try:
        return syscalls.open_beneath(folder, file, os.O_WRONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return -1


def _cloned(source: int, target: int) -> bool:
    """Let a file share all of another's blocks; False if the file system cannot."""
    try:
        fcntl.ioctl(target, uapi.FICLONE, source)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EINVAL):
            raise
        return False
    return True

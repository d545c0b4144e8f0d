"""Restoring and verifying: each block is checked before it is written, so nothing wrong reaches an object."""

from __future__ import annotations

import contextlib
import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Final

from gmemd.errors import QmpError, os_errors
from gmemd.kernel import backing, syscalls, uapi
from gmemd.snapshots.buffers import Buffers
from gmemd.snapshots.crew import by_two
from gmemd.snapshots.pages import CHUNK, PAGE, WINDOW, filled, pieces, runs
from gmemd.snapshots.save import Message, Talk, progress
from gmemd.snapshots.source import Source, readable
from gmemd.snapshots.stored import Stored
from gmemd.snapshots.tables import write_fully


class Target:
    """A range of memory to be filled; borrows the descriptor. What is not written must be zeros already.

    A memfd and a file are written; huge pages and a guest_memfd, which have no write(2), are mapped, and their pages
    allocated before they are touched, so that a lack of memory is an error and not a signal.
    """

    def __init__(self, fd: int, offset: int, what: str) -> None:
        self._fd, self._offset, self._what = fd, offset, what
        self._page = backing.page_size(fd)
        self._mapped = not readable(fd) or syscalls.filesystem(fd)[0] == uapi.HUGETLBFS_MAGIC

    def clear(self, size: int) -> None:
        """Make all of it zeros."""
        with os_errors(f"cannot clear '{self._what}'"):
            try:
                syscalls.fallocate(self._fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, self._offset, size)
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                for at in range(0, size, CHUNK):
                    write_fully(self._fd, memoryview(bytes(min(CHUNK, size - at))), self._offset + at)

    def fill(self, source: Source) -> Iterator[int]:
        """Write everything that is not zeros; yields the bytes that were read, as it goes."""
        return _by_pieces(source, source.windows(), source.blocks, self.write)

    def write(self, at: int, view: memoryview) -> None:
        """Write the pages of a chunk that are not zeros."""
        parts = list(runs(filled(view)))
        with os_errors(f"cannot write '{self._what}'"):
            if not self._mapped:
                for start, count in parts:
                    write_fully(self._fd, view[start:start + count], self._offset + at + start)
            elif parts:
                self._copy(self._offset + at, view, parts)

    def zero(self, at: int, count: int) -> None:
        """Make pages zeros again, without their memory where that is possible."""
        with os_errors(f"cannot write '{self._what}'"):
            if self._page == PAGE:
                with contextlib.suppress(OSError):  # not every file system can
                    mode = uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE
                    syscalls.fallocate(self._fd, mode, self._offset + at, count)
                    return
            view = memoryview(bytes(count))
            if self._mapped:
                self._copy(self._offset + at, view, [(0, count)])
            else:
                write_fully(self._fd, view, self._offset + at)

    def _copy(self, at: int, view: memoryview, parts: list[tuple[int, int]]) -> None:
        begin = at // self._page * self._page
        end = -(-(at + len(view)) // self._page) * self._page
        with mmap.mmap(self._fd, end - begin, offset=begin) as window, memoryview(window) as contents:
            for start, count in parts:
                place = at - begin + start
                window.madvise(uapi.MADV_POPULATE_WRITE, place, count)
                contents[place:place + count] = view[start:start + count]


def restore(spec: Message) -> Talk:
    """Write a snapshot into memory of its size, which is all zeros unless `clear` is given.

    {"root": fd, "name", "id": the object's, "memory": {"fd", "offset"}, "private": {"fd"}?, "clear": bool?}.
    """
    name = spec["name"]
    with Stored(spec["root"], name) as stored:
        if "memory" not in stored.parts:
            raise QmpError(f"snapshot '{name}' holds no memory, only the state of a VMM")
        if "private" in stored.parts and "private" not in spec:
            raise QmpError(f"snapshot '{name}' has private bytes, and '{spec['id']}' has no room for them")
        stored.check_state()
        yield {"total": stored.total()}
        done = 0
        for part, source in stored.parts.items():
            target = Target(spec[part]["fd"], spec[part].get("offset", 0), spec["id"])
            if spec.get("clear"):
                target.clear(source.size)
            done = yield from progress(target.fill(source), done)
        return {"bytes": done}


def verify(spec: Message) -> Talk:
    """Read everything of a snapshot, {"root": fd, "name"}; QmpError names what is damaged."""
    with Stored(spec["root"], spec["name"]) as stored:
        yield {"total": stored.total()}
        stored.check_state()
        done = 0
        for part in stored.parts.values():
            part.check_file()
            done = yield from progress(_by_pieces(part, part.all_windows(), part.all_blocks, part.check_strays), done)
        return {"id": stored.manifest["id"], "bytes": done}


def _by_pieces(source: Source, windows: Iterator[int], blocks: Callable[[int], set[int]],
               done: Callable[[int, memoryview], None]) -> Iterator[int]:
    """Read these blocks of these windows and call `done` with each piece and its offset; yields the bytes, as it goes.
    """
    def work(window: int, buffers: Buffers) -> int:
        length, count = min(WINDOW, source.size - window * WINDOW), 0
        for start, end in pieces(length, blocks(window)):
            view = buffers.data[:end - start]
            source.read(window * WINDOW + start, view)
            done(window * WINDOW + start, view)
            count += len(view)
        return count

    return by_two(windows, work)


VERBS: Final = {"restore": restore, "verify": verify}

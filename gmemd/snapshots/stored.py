"""The reader of a stored snapshot: every block that it gives was checked against its digest, and every table before.

A part is a Source, so it is restored, flattened, compressed and copied like the memory of an object.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from heapq import merge
from itertools import groupby
from typing import Any, Final

from xxhash import xxh3_128_digest

from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots import manifest
from gmemd.snapshots.cold import Frames
from gmemd.snapshots.folder import open_folder
from gmemd.snapshots.pages import BLOCK, NOTHING, PAGE, WINDOW, filled, runs, without
from gmemd.snapshots.tables import Tables, blocks_of_data, read_exactly, sha256_of, windows_of_data

PARTS: Final = ("memory", "private")
_PREFIX: Final = {"memory": "", "private": "private-"}
_READ: Final = os.O_RDONLY | os.O_NONBLOCK
_ZEROS: Final = bytes(BLOCK)


def files_of(part: str) -> tuple[str, str, str]:
    """The names of a part's files: data, map, digests."""
    return f"{part}.raw", f"{_PREFIX[part]}map.bin", f"{_PREFIX[part]}digests.bin"


class Stored:
    """A snapshot opened for reading, with its parent if it needs that one; owns their descriptors."""

    def __init__(self, root: int, name: str) -> None:
        self._open = contextlib.ExitStack()
        self.name = name
        try:
            self.folder = open_folder(root, name)
            self._open.callback(close_fd, self.folder)
            self.manifest, self.sha256 = manifest.read(self.folder, name)
            if self.manifest["name"] != name:
                raise manifest.damaged(name, f"{manifest.NAME} is that of '{self.manifest['name']}'")
            parts = self.manifest["parts"]
            parent = self._parent(root) if any([part["stored"] == "delta" for part in parts.values()]) else None
            self.parts = {part: self._part(part, entry, parent) for part, entry in parts.items()
                          if entry["stored"] in manifest.WITH_TABLES}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close everything."""
        self._open.close()

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The bytes of the object."""
        size: int = self.manifest["object"]["size"]
        return size

    def total(self) -> int:
        """About how many bytes there are to read."""
        return sum(part.total() for part in self.parts.values())

    def check_state(self) -> None:
        """Refuse a device state that is not the one that was saved."""
        entry = self.manifest.get("device-state")
        if entry is None:
            return
        with self._file(entry["file"], entry["bytes"]) as fd, os_errors(f"cannot read snapshot '{self.name}'"):
            if sha256_of(fd, entry["bytes"]) != entry["sha256"]:
                raise manifest.damaged(self.name, f"{entry['file']} does not match its sha256")

    def _parent(self, root: int) -> Stored:
        """The parent of a delta, which must be the very same."""
        entry = self.manifest.get("parent")
        if entry is None:
            raise QmpError(f"snapshot '{self.name}' is a delta without a parent")
        needs = f"snapshot '{self.name}' needs its parent '{entry['name']}' ({entry['id']})"
        try:
            parent = Stored(root, entry["name"])
        except QmpError as exc:
            raise QmpError(f"{needs}: {exc.desc}") from exc
        self._open.callback(parent.close)
        if parent.sha256 != entry["sha256"]:
            raise QmpError(f"{needs}, and there is another one of that name")
        if any([part["stored"] == "delta" for part in parent.manifest["parts"].values()]):
            raise QmpError(f"{needs}, which is a delta itself")
        return parent

    def _part(self, part: str, entry: dict[str, Any], parent: Stored | None) -> Part:
        base = None
        if entry["stored"] == "delta":
            assert parent is not None
            base = parent.parts.get(part)
            if base is None or base.size != self.size:
                raise manifest.damaged(self.name, f"its parent has no such part, '{part}'")
        made = Part(self, part, entry, base)
        self._open.callback(made.close)
        return made

    @contextlib.contextmanager
    def _file(self, file: str, size: int) -> Iterator[int]:
        fd = self.open_file(file, size)
        try:
            yield fd
        finally:
            close_fd(fd)

    def open_file(self, file: str, size: int | None) -> int:
        """A descriptor of one of its files, which must have this size; the caller owns it."""
        try:
            fd = open_beneath(self.folder, file, _READ)
        except FileNotFoundError:
            raise manifest.damaged(self.name, f"{file} is missing") from None
        except OSError as exc:
            raise QmpError(f"cannot open {file} of snapshot '{self.name}': {os.strerror(exc.errno or 0)}") from exc
        found = os.fstat(fd).st_size
        if size is not None and found != size:
            close_fd(fd)
            raise manifest.damaged(self.name, f"{file} has {found} bytes instead of {size}")
        return fd


class Part:
    """One part of a stored snapshot: a Source of checked bytes."""

    def __init__(self, owner: Stored, part: str, entry: dict[str, Any], base: Part | None) -> None:
        self.size, self._name, self._entry, self.base = owner.size, owner.name, entry, base
        self.file: str = entry["file"]
        _, map_name, digests_name = files_of(part)
        with contextlib.ExitStack() as opened:
            try:
                with os_errors(f"cannot open snapshot '{self._name}'"):
                    self.tables = Tables(owner.folder, map_name, digests_name, self.size)
            except QmpError as exc:
                raise manifest.damaged(self._name, f"{map_name} or {digests_name}: {exc.desc}") from exc
            opened.callback(self.tables.close)
            self._check_tables(map_name, digests_name)
            self.raw = owner.open_file(self.file, None if entry["stored"] == "cold" else self.size)
            opened.callback(close_fd, self.raw)
            self._frames = None
            if entry["stored"] == "cold":
                with os_errors(f"cannot read snapshot '{self._name}'"):
                    self._frames = Frames(self.raw, self.tables, self._name, self.file)
            self._open = opened.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def _check_tables(self, *names: str) -> None:
        found = zip(names, (self.tables.map, self.tables.digests), self.tables.lengths,
                    ("map-sha256", "digests-sha256"), strict=True)
        for name, fd, length, member in found:
            with os_errors(f"cannot read {name} of snapshot '{self._name}'"):
                size = os.fstat(fd).st_size
                if size != length:
                    raise manifest.damaged(self._name, f"{name} has {size} bytes instead of {length}")
                if sha256_of(fd, length) != self._entry[member]:
                    raise manifest.damaged(self._name, f"{name} does not match its sha256")

    @property
    def whole(self) -> bool:
        """Whether its file alone is the object, byte for byte."""
        return self._entry["stored"] in ("full", "reflink")

    @property
    def is_cold(self) -> bool:
        """Whether it is compressed."""
        return self._frames is not None

    def check_file(self) -> None:
        """Refuse a compressed file that is not the one that was saved, even where that changes no byte of memory."""
        if self._frames is not None:
            with os_errors(f"cannot read snapshot '{self._name}'"):
                if sha256_of(self.raw, os.fstat(self.raw).st_size) != self._entry["file-sha256"]:
                    raise manifest.damaged(self._name, f"{self.file} does not match its sha256")

    # -- as a Source -----------------------------------------------------------------------------------------

    def total(self) -> int:
        return sum(len(self.tables.blocks(window)) for window in self.tables.windows()) * BLOCK

    def windows(self) -> Iterator[int]:
        return self.tables.windows()

    def blocks(self, window: int) -> set[int]:
        return self.tables.blocks(window)

    def all_windows(self) -> Iterator[int]:
        """Those, and the ones in which the file has data although the tables say that there is none."""
        if self._frames is not None:
            return self.windows()
        return (window for window, _ in groupby(merge(
            self.windows(), windows_of_data(self.raw, 0, self.size, WINDOW))))

    def all_blocks(self, window: int) -> set[int]:
        """The same of blocks."""
        start = window * WINDOW
        data = set() if self.is_cold else blocks_of_data(self.raw, start, min(WINDOW, self.size - start))[0]
        return self.blocks(window) | data

    def read(self, at: int, view: memoryview) -> None:
        """Fill a buffer with what begins at an offset, a multiple of 64 KiB, inside one window; checked."""
        with os_errors(f"cannot read snapshot '{self._name}'"):
            digests, mask = self.tables.read(at // WINDOW)
            start = at % WINDOW
            mask = mask[start // PAGE:(start + len(view)) // PAGE]
            digests = digests[start // BLOCK * len(NOTHING):]
            if self.base is not None:
                self.base.read(at, view)
                self._overlay(at, view, mask)
            elif self._frames is not None:
                self._frames.read(at, view)
            else:
                self._read_raw(at, view)
        self._check(at, view, digests)

    def _read_raw(self, at: int, view: memoryview) -> None:
        try:
            read_exactly(self.raw, view, at)
        except OSError as exc:
            if exc.errno != errno.ENODATA:
                raise
            raise manifest.damaged(self._name, f"{self.file} ends before {at + len(view):#x}") from exc

    def _overlay(self, at: int, view: memoryview, mask: bytearray) -> None:
        """Put the pages of a delta over its parent's."""
        for start, count in runs(mask):
            self._read_raw(at + start, view[start:start + count])

    def _check(self, at: int, view: memoryview, digests: bytearray) -> None:
        for number, start in enumerate(range(0, len(view), BLOCK)):
            block = view[start:start + BLOCK]
            want = digests[number * len(NOTHING):(number + 1) * len(NOTHING)]
            good = xxh3_128_digest(block) == want if want != NOTHING else bytes(block) == _ZEROS[:len(block)]
            if not good:
                raise manifest.damaged(self._name, f"{self.file} does not match its digest at {at + start:#x}")

    def check_strays(self, at: int, view: memoryview) -> None:
        """Refuse bytes in a delta's file at pages that its map says are the parent's, or a map of other pages."""
        _, mask = self.tables.read(at // WINDOW)
        start = at % WINDOW
        mask = mask[start // PAGE:(start + len(view)) // PAGE]
        if self.base is not None:
            self._read_raw(at, view)
            wrong = without(filled(view), mask)
        else:
            wrong = filled(view)
            wrong = bytearray(a ^ b for a, b in zip(wrong, mask, strict=True))
        if wrong.find(1) >= 0:
            raise manifest.damaged(self._name, f"{self.file} and its map differ at {at + wrong.find(1) * PAGE:#x}")



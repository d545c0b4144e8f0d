"""Random operations on an object and its snapshots, held against a plain model: bytes in memory."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.kernel.syscalls import fallocate
from gmemd.kernel.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from gmemd.snapshots.folder import remove
from tests.snapshots.engine import BLOCK, MIB, PAGE, contents, manifest_of, memfd, opened
from tests.snapshots.here import do_here, restore_here, save_here

SIZE = 16 * MIB + 3 * BLOCK + 2 * PAGE  # two windows, and a block that is not full
PLACES = (0, 3 * BLOCK, 2 * MIB - BLOCK, 16 * MIB - BLOCK)  # where it is written: 4 blocks and what follows
NAMES = "abcdef"


class Model:
    """The memory and the snapshots as they should be, beside those that are."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root, self._chance = root, random.Random(seed)
        self._fd, self._memory = memfd(SIZE), bytearray(SIZE)
        self._stored: dict[str, bytes] = {}
        self.done: dict[str, int] = {}

    def close(self) -> None:
        os.close(self._fd)

    def step(self) -> None:
        """One operation; AssertionError if anything is other than in the model."""
        name = self._chance.choices(("write", "zero", "punch", "save", "increment", "restore", "flatten", "cold",
                                     "delete", "verify"), (30, 8, 8, 8, 14, 10, 6, 4, 6, 6))[0]
        done = getattr(self, f"_{name}")()
        if done:
            self.done[name] = self.done.get(name, 0) + 1

    # -- the object

    def _range(self) -> tuple[int, int]:
        at = self._chance.choice(PLACES) + self._chance.randrange(3 * BLOCK)
        return at, min(self._chance.choice((1, 100, PAGE, 5 * PAGE, 2 * BLOCK)), SIZE - at)

    def _put(self, at: int, data: bytes) -> bool:
        os.pwrite(self._fd, data, at)
        self._memory[at:at + len(data)] = data
        return True

    def _write(self) -> bool:
        at, count = self._range()
        if self._chance.random() < 0.3 and self._stored:  # bytes that were there before
            return self._put(at, self._chance.choice(list(self._stored.values()))[at:at + count])
        return self._put(at, self._chance.randbytes(count))

    def _zero(self) -> bool:
        at, count = self._range()
        return self._put(at, bytes(count))

    def _punch(self) -> bool:
        at, count = self._range()
        at, count = at // PAGE * PAGE, -(-count // PAGE) * PAGE
        fallocate(self._fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, at, count)
        self._memory[at:at + count] = bytes(len(self._memory[at:at + count]))
        return True

    # -- snapshots

    def _free(self) -> str:
        return self._chance.choice([name for name in NAMES if name not in self._stored] or [""])

    def _some(self) -> str:
        return self._chance.choice(sorted(self._stored) or [""])

    def _save(self, parent: str = "") -> bool:
        name = self._free()
        if name:
            save_here(self._root, name, self._fd, parent=parent)
            self._stored[name] = bytes(self._memory)
            self._judge(name)
        return bool(name)

    def _form(self, name: str) -> str:
        form: str = manifest_of(self._root, name)["parts"]["memory"]["stored"]
        return form

    def _increment(self) -> bool:
        parent = self._some()
        return bool(parent) and self._form(parent) in ("full", "reflink") and self._save(parent)

    def _children(self, name: str) -> list[str]:
        own = manifest_of(self._root, name)["id"]
        return [other for other in self._stored if self._form(other) == "delta"
                and manifest_of(self._root, other)["parent"]["id"] == own]

    def _restore(self) -> bool:
        name = self._some()
        if name:
            with memory_of(SIZE) as fd:
                restore_here(self._root, name, fd)
                assert contents(fd) == self._stored[name]
        return bool(name)

    def _flatten(self) -> bool:
        name = self._some()
        if not name or self._form(name) in ("full", "reflink"):
            return False
        do_here("flatten", self._root, name)
        assert self._form(name) in ("full", "reflink")
        self._judge(name)
        return True

    def _cold(self) -> bool:
        name = self._some()
        if not name or self._form(name) == "cold":
            return False
        if self._children(name):
            with pytest.raises(QmpError, match="is the parent of"):
                do_here("cold", self._root, name)
            return False
        do_here("cold", self._root, name)
        self._judge(name)
        return True

    def _delete(self) -> bool:
        name = self._some()
        if not name or self._children(name):
            return False
        with opened(self._root) as root:
            remove(root, name)
        del self._stored[name]
        assert sorted(os.listdir(self._root)) == sorted(self._stored)
        return True

    def _verify(self) -> bool:
        for name in self._stored:
            self._judge(name)
        assert contents(self._fd) == self._memory
        return True

    def _judge(self, name: str) -> None:
        do_here("verify", self._root, name)
        if self._form(name) in ("full", "reflink"):
            assert (self._root / name / "memory.raw").read_bytes() == self._stored[name]


@contextlib.contextmanager
def memory_of(size: int) -> Iterator[int]:
    """The descriptor of a memfd for the time of a block."""
    fd = memfd(size)
    try:
        yield fd
    finally:
        os.close(fd)

"""Objects at the edges of blocks, chunks and windows, empty and full, in every form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.snapshots.engine import BLOCK, MIB, PAGE, contents, manifest_of, memfd
from tests.snapshots.here import do_here, restore_here, save_here


@pytest.mark.parametrize("size", [PAGE, BLOCK - PAGE, BLOCK, BLOCK + PAGE, 2 * MIB + PAGE, 16 * MIB, 16 * MIB + PAGE])
@pytest.mark.parametrize("full", [False, True], ids=["empty", "full"])
def test_every_size(tmp_path: Path, size: int, full: bool) -> None:
    """Saved, changed at its end, saved again, compressed and flattened: the same comes back each time."""
    fd, was = memfd(size), b""
    if full:
        os.pwrite(fd, b"x" * size, 0)
    save_here(tmp_path, "a", fd)
    was = contents(fd)
    os.pwrite(fd, b"end", size - 3)
    save_here(tmp_path, "b", fd, parent="a")
    for verb in ("verify", "flatten", "verify", "cold", "verify", "flatten"):
        if verb != "flatten" or manifest_of(tmp_path, "b")["parts"]["memory"]["stored"] in ("delta", "cold"):
            do_here(verb, tmp_path, "b")
    do_here("cold", tmp_path, "a")
    for name, expected in (("a", was), ("b", contents(fd))):
        target = memfd(size)
        restore_here(tmp_path, name, target)
        assert contents(target) == expected
        os.close(target)
    os.close(fd)

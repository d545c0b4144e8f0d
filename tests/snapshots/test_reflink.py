"""On a file system with reflinks, an increment is a full file that shares what did not change; and stands alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.snapshots.engine import BLOCK, MIB, PAGE, contents, do, manifest_of, memfd, restore, save

SIZE = 32 * MIB


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A folder on an XFS of its own."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("needs mkfs.xfs (Debian package xfsprogs)")
    image, place = tmp_path / "image", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    place.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs leave to mount a file: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def used(place: Path) -> int:
    os.sync()
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_an_increment_stands_alone(xfs: Path) -> None:
    """Only what changed takes room, without the parent it is whole, and the parent is as it was."""
    fd, target = memfd(SIZE), memfd(SIZE)
    os.pwrite(fd, os.urandom(24 * MIB), 0)
    save(xfs, "a", fd)
    before, was = used(xfs), contents(fd)
    os.pwrite(fd, b"changed", 5 * MIB)
    os.pwrite(fd, bytes(3 * PAGE), 6 * MIB)
    os.pwrite(fd, b"new", 30 * MIB)
    save(xfs, "b", fd, parent="a")
    assert used(xfs) - before < MIB
    assert manifest_of(xfs, "b")["parts"]["memory"]["stored"] == "reflink"
    assert (xfs / "b" / "memory.raw").read_bytes() == contents(fd)
    assert (xfs / "a" / "memory.raw").read_bytes() == was
    do("verify", xfs, "a")
    os.pwrite(fd, b"again", 5 * MIB)
    save(xfs, "c", fd, parent="b", dirty=[[5 * MIB, PAGE]])
    for name in ("a", "b"):
        shutil.rmtree(xfs / name)
    do("verify", xfs, "c")
    restore(xfs, "c", target)
    assert contents(target) == contents(fd)
    os.close(fd)
    os.close(target)


def test_a_delta_from_elsewhere_is_flattened_to_a_clone(xfs: Path, tmp_path: Path) -> None:
    """A delta that was copied here with its parent becomes a file that shares with the parent's."""
    fd, target, elsewhere = memfd(SIZE), memfd(SIZE), tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.pwrite(fd, os.urandom(20 * MIB), 0)
    save(elsewhere, "a", fd)
    os.pwrite(fd, os.urandom(2 * BLOCK), 7 * MIB)
    save(elsewhere, "b", fd, parent="a")
    if manifest_of(elsewhere, "b")["parts"]["memory"]["stored"] != "delta":
        pytest.skip("here, increments are clones of files anyway")
    shutil.copytree(elsewhere, xfs, dirs_exist_ok=True)
    before = used(xfs)
    do("flatten", xfs, "b")
    assert used(xfs) - before < MIB
    do("verify", xfs, "b")
    restore(xfs, "b", target)
    assert contents(target) == contents(fd)
    os.close(fd)
    os.close(target)

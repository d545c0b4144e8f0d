"""What was saved is what is restored: memory of every kind, in every form, with everything that a form promises."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from tests.snapshots.engine import (
    BLOCK,
    MIB,
    PAGE,
    contents,
    do,
    manifest_of,
    memfd,
    opened,
    restore,
    running,
    save,
)

SIZE = 20 * MIB + 5 * PAGE


@pytest.fixture
def fd() -> int:
    """Pages, runs, a block of zeros that exists, and holes."""
    made, chance = memfd(SIZE), random.Random(1)
    for _ in range(50):
        os.pwrite(made, chance.randbytes(5000), chance.randrange(SIZE - 5000))
    os.pwrite(made, chance.randbytes(3 * MIB), 4 * MIB)
    os.pwrite(made, bytes(2 * BLOCK), 10 * MIB)
    os.pwrite(made, b"the end", SIZE - 7)
    return made


def restored(root: Path, name: str, size: int = SIZE) -> bytes:
    target = memfd(size)
    try:
        restore(root, name, target)
        return contents(target)
    finally:
        os.close(target)


def test_byte_n_is_byte_n(tmp_path: Path, fd: int) -> None:
    """memory.raw is the memory itself, and sparse; nothing became resident by reading it."""
    before = os.fstat(fd).st_blocks
    save(tmp_path, "s", fd)
    assert os.fstat(fd).st_blocks == before
    raw = tmp_path / "s" / "memory.raw"
    assert raw.read_bytes() == contents(fd)
    assert raw.stat().st_blocks < before
    assert do("verify", tmp_path, "s")["id"] == manifest_of(tmp_path, "s")["id"]
    assert restored(tmp_path, "s") == contents(fd)
    assert os.listdir(tmp_path) == ["s"]


def test_an_increment_holds_what_differs(tmp_path: Path, fd: int) -> None:
    """Changed pages only; one that became zeros is a hole that counts."""
    save(tmp_path, "a", fd)
    os.pwrite(fd, b"changed", 5 * MIB)
    os.pwrite(fd, bytes(PAGE), 6 * MIB)
    save(tmp_path, "b", fd, parent="a")
    entry = manifest_of(tmp_path, "b")["parts"]["memory"]
    assert entry["stored"] in ("delta", "reflink")
    if entry["stored"] == "delta":
        assert entry["bytes"] == PAGE
    assert restored(tmp_path, "b") == contents(fd)
    do("verify", tmp_path, "b")


@pytest.mark.parametrize("verb", ["flatten", "cold"])
def test_other_forms_hold_the_same(tmp_path: Path, fd: int, verb: str) -> None:
    """A delta that was flattened or compressed needs its parent no more, and keeps its id and device state."""
    save(tmp_path, "a", fd)
    os.pwrite(fd, os.urandom(10 * PAGE), 5 * MIB)
    with running("save", {"name": "b", "id": "m", "size": SIZE, "parent": "a", "memory": {"fd": fd}},
                 tmp_path, [fd]) as engine:
        draft = tmp_path / engine.heard("folder")["folder"]
        engine.tell({"pass": {"dirty": None}})
        engine.heard("passed")
        (draft / "vmstate").write_bytes(b"devices")
        engine.tell({"finish": {"object": {"id": "m", "qom-type": "memory-backend-memfd"}, "generation": 7,
                                "device-state": {"vmm": "QEMU"}, "consistency": {"via": "qmp", "consistent": True}}})
        engine.heard("end")
    before = manifest_of(tmp_path, "b")
    do(verb, tmp_path, "b")
    after = manifest_of(tmp_path, "b")
    with opened(tmp_path) as root:
        os.rename("a", "elsewhere", src_dir_fd=root, dst_dir_fd=root)
    do("verify", tmp_path, "b")
    assert restored(tmp_path, "b") == contents(fd)
    assert {**before, "parts": 0, "sha256": 0, "parent": 0} == {**after, "parts": 0, "sha256": 0, "parent": 0}
    assert (tmp_path / "b" / "vmstate").read_bytes() == b"devices"
    assert sorted(os.listdir(tmp_path)) == ["b", "elsewhere"]


def test_cold_becomes_full_again(tmp_path: Path, fd: int) -> None:
    """Compressed and back: the same file; an increment needs the full one."""
    save(tmp_path, "a", fd)
    raw = (tmp_path / "a" / "memory.raw").read_bytes()
    do("cold", tmp_path, "a")
    assert not (tmp_path / "a" / "memory.raw").exists()
    with pytest.raises(QmpError, match="snapshot 'a' cannot be a parent: it is not stored in full"):
        save(tmp_path, "b", fd, parent="a")
    do("flatten", tmp_path, "a")
    assert (tmp_path / "a" / "memory.raw").read_bytes() == raw
    with pytest.raises(QmpError, match="snapshot 'a' is stored in full already"):
        do("flatten", tmp_path, "a")


def test_a_parent_is_not_compressed_under_its_children(tmp_path: Path, fd: int) -> None:
    """The child is named; and a parent that is not the very same is refused, also by name."""
    save(tmp_path, "a", fd)
    os.pwrite(fd, b"changed", 5 * MIB)
    save(tmp_path, "b", fd, parent="a")
    if manifest_of(tmp_path, "b")["parts"]["memory"]["stored"] != "delta":
        pytest.skip("here, increments are clones of files")
    with pytest.raises(QmpError, match="snapshot 'a' is the parent of 'b': flatten that first"):
        do("cold", tmp_path, "a")
    (tmp_path / "a").rename(tmp_path / "was")
    with pytest.raises(QmpError, match=r"snapshot 'b' needs its parent 'a' \(.*\): snapshot 'a' not found"):
        do("verify", tmp_path, "b")
    save(tmp_path, "a", fd)
    with pytest.raises(QmpError, match="and there is another one of that name"):
        restored(tmp_path, "b")
    os.pwrite(fd, b"changed again", 5 * MIB)
    save(tmp_path, "c", fd, parent="a")
    with pytest.raises(QmpError, match="snapshot 'c' cannot be a parent"):
        save(tmp_path, "d", fd, parent="c")

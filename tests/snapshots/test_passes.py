"""A guest that runs on while it is saved: what the last pass finds is what is stored."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from gmemd.errors import QmpError
from tests.snapshots.engine import (
    BLOCK,
    MEMBERS,
    MIB,
    PAGE,
    Engine,
    contents,
    do,
    manifest_of,
    memfd,
    restore,
    running,
    save,
)

SIZE = 34 * MIB


def spec(fd: int, name: str = "s", **more: Any) -> dict[str, Any]:
    return {"name": name, "id": "m", "size": SIZE, "memory": {"fd": fd}, **more}


def one_pass(engine: Engine, dirty: list[list[int]] | None) -> int:
    engine.tell({"pass": {"dirty": dirty}})
    count: int = engine.heard("passed")["bytes"]
    return count


def finish(engine: Engine) -> None:
    engine.tell({"finish": MEMBERS})
    engine.heard("end")


def judge(root: Path, name: str, fd: int) -> None:
    do("verify", root, name)
    target = memfd(SIZE)
    restore(root, name, target)
    assert contents(target) == contents(fd)
    os.close(target)


@pytest.mark.parametrize("parent", ["", "a"])
@pytest.mark.parametrize("tracked", [False, True])
def test_the_last_pass_counts(tmp_path: Path, parent: str, tracked: bool) -> None:
    """Pages that changed, came and went after the first pass; some went back to what the parent has."""
    fd = memfd(SIZE)
    os.pwrite(fd, b"old" * MIB, 0)
    os.pwrite(fd, b"last window", 33 * MIB)
    if parent:
        save(tmp_path, parent, fd)
        os.pwrite(fd, b"changed once", 2 * MIB)
        os.pwrite(fd, bytes(PAGE), MIB)
    more = {"parent": parent} if parent else {}
    with running("save", spec(fd, live=True, **more), tmp_path, [fd]) as engine:
        engine.heard("ready")
        os.pwrite(fd, b"new", 0)
        os.pwrite(fd, b"came", 20 * MIB)
        os.posix_fallocate(fd, 21 * MIB, BLOCK)
        os.pwrite(fd, b"old" * PAGE, 2 * MIB // 3 * 3)  # as it was before
        os.pwrite(fd, bytes(11), 33 * MIB)
        dirty = [[0, PAGE], [20 * MIB, PAGE], [21 * MIB, BLOCK], [2 * MIB - 2, 4 * PAGE], [33 * MIB, PAGE]]
        read = one_pass(engine, dirty if tracked else None)
        assert (read <= 8 * BLOCK) == tracked
        finish(engine)
    judge(tmp_path, "s", fd)
    os.close(fd)


def test_an_increment_by_what_is_dirty(tmp_path: Path) -> None:
    """With tracking, only blocks with dirty pages are read; without a parent that is refused."""
    fd = memfd(SIZE)
    for at in range(0, SIZE, MIB):
        os.pwrite(fd, os.urandom(PAGE), at)
    with pytest.raises(QmpError, match="snapshot 's' has no parent since which pages are dirty"):
        save(tmp_path, "s", fd, dirty=[[0, PAGE]])
    save(tmp_path, "a", fd)
    os.pwrite(fd, b"x", 7 * MIB + 5)
    os.pwrite(fd, b"x", SIZE - 1)
    with running("save", spec(fd, parent="a"), tmp_path, [fd]) as engine:
        engine.heard("ready")
        assert one_pass(engine, [[7 * MIB, PAGE], [SIZE - PAGE, PAGE]]) == 2 * BLOCK
        finish(engine)
    if manifest_of(tmp_path, "s")["parts"]["memory"]["stored"] == "delta":
        assert manifest_of(tmp_path, "s")["parts"]["memory"]["bytes"] == 2 * PAGE
    judge(tmp_path, "s", fd)
    os.close(fd)


def test_given_up(tmp_path: Path) -> None:
    """When the daemon lets go before the end, nothing is left; and it can be done right then."""
    fd = memfd(SIZE)
    os.pwrite(fd, b"x", 0)
    with running("save", spec(fd), tmp_path, [fd]) as engine:
        engine.heard("ready")
        assert len(os.listdir(tmp_path)) == 1
        assert engine.end() == 0
    assert os.listdir(tmp_path) == []
    save(tmp_path, "s", fd)
    with pytest.raises(QmpError, match="snapshot 's' exists already"):
        save(tmp_path, "s", fd)
    assert os.listdir(tmp_path) == ["s"]
    judge(tmp_path, "s", fd)
    os.close(fd)


def test_the_daemon_ends_meanwhile(tmp_path: Path) -> None:
    """A worker that nobody listens to any more gives up, removes its draft and says nothing about it."""
    fd = memfd(SIZE)
    os.pwrite(fd, b"x" * SIZE, 0)
    with running("save", spec(fd), tmp_path, [fd], stderr=subprocess.PIPE) as engine:
        engine.heard("ready")
        engine._stdout.close()
        engine.tell({"pass": {"dirty": None}})
        assert engine.process.stderr is not None
        assert engine.process.stderr.read() == b""
        engine.process.stderr.close()
        assert engine.process.wait() == 1
    assert os.listdir(tmp_path) == []
    os.close(fd)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "a" * 201, "a b", "ä"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    """No slash, no dot in front, nothing that a shell minds."""
    fd = memfd(SIZE)
    for verb in ("save", "verify"):
        with pytest.raises(QmpError, match="cannot be the name of a snapshot"), \
                running(verb, spec(fd, name), tmp_path, [fd]) as engine:
            engine.heard("ready", "end")
    assert os.listdir(tmp_path) == []
    os.close(fd)


def test_state_without_memory(tmp_path: Path) -> None:
    """What is only the state of a VMM has no memory to be restored, and is verified all the same."""
    fd = memfd(SIZE)
    with running("save", {"name": "s", "id": "m", "size": SIZE}, tmp_path, []) as engine:
        draft = tmp_path / engine.heard("folder")["folder"]
        (draft / "vmstate").write_bytes(b"devices")
        engine.heard("ready")
        engine.tell({"finish": {**MEMBERS, "parts": {"memory": {"stored": "object", "bytes": 0}}}})
        assert engine.heard("end")["bytes"] == 7
    do("verify", tmp_path, "s")
    with pytest.raises(QmpError, match="snapshot 's' holds no memory, only the state of a VMM"):
        restore(tmp_path, "s", fd)
    os.close(fd)


@pytest.mark.parametrize("parent", ["", "a"])
def test_a_writer_that_never_rests(tmp_path: Path, parent: str) -> None:
    """Pages that flip between two contents while they are hashed and written; what they are in the end is stored."""
    fd, chance, stop = memfd(SIZE), random.Random(1), threading.Event()
    contents_of = [bytes(PAGE), b"a" * PAGE, b"b" * PAGE]
    for at in range(0, SIZE, PAGE * 3):
        os.pwrite(fd, contents_of[1], at)
    if parent:
        save(tmp_path, parent, fd)

    def write() -> None:
        while not stop.is_set():
            os.pwrite(fd, chance.choice(contents_of), chance.randrange(SIZE // PAGE) * PAGE)

    writer = threading.Thread(target=write)
    more = {"parent": parent} if parent else {}
    with running("save", spec(fd, live=True, **more), tmp_path, [fd]) as engine:
        writer.start()
        try:
            engine.heard("ready")
            one_pass(engine, None)  # another one while it writes
        finally:
            stop.set()
            writer.join()
        one_pass(engine, None)
        finish(engine)
    judge(tmp_path, "s", fd)
    os.close(fd)


def test_memory_that_is_all_there(tmp_path: Path) -> None:
    """Of windows without holes the last pass copies only what has changed; holes that came meanwhile stay holes."""
    fd = memfd(SIZE)
    os.pwrite(fd, random.Random(5).randbytes(SIZE), 0)
    with running("save", spec(fd, live=True), tmp_path, [fd]) as engine:
        engine.heard("ready")
        os.pwrite(fd, b"new", 20 * MIB)
        subprocess.run(["fallocate", "--punch-hole", "--offset", "1M", "--length", "2M", f"/proc/self/fd/{fd}"],
                       pass_fds=[fd], check=True)
        there = os.fstat(fd).st_blocks
        assert one_pass(engine, None) >= SIZE - 2 * MIB
        assert os.fstat(fd).st_blocks == there
        finish(engine)
    judge(tmp_path, "s", fd)

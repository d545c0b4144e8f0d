"""A sparse object of 1 TiB is saved, verified and restored, and nothing but what is in it becomes resident."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path
from typing import Any

from tests.snapshots.engine import MEMBERS, MIB, PAGE, Engine, memfd, running

TIB = 1 << 40
POPULATED = int(os.environ.get("GMEMD_POPULATED", "24")) * MIB  # script/robustness asks for 1 GiB
ADDED = 64 * MIB  # what a worker may take, all that the interpreter takes included


def finished(engine: Engine, member: str) -> int:
    """Let it come so far; the most memory that it had until then, in bytes."""
    peak = 0
    while True:
        status = Path(f"/proc/{engine.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = int(found[1]) * 1024 if found else peak
        if member in engine.heard("total", "done", "ready", "passed", "end"):
            return peak


def test_only_what_is_there(tmp_path: Path) -> None:
    """Half of it scattered pages, half of it in rows; no page more is in memory than before."""
    fd, target, chance = memfd(TIB), memfd(TIB), random.Random(1)
    places = [chance.randrange(TIB // PAGE) * PAGE for _ in range(POPULATED // 16 // PAGE)]
    for at in places:
        os.pwrite(fd, chance.randbytes(PAGE), at)
    for _ in range(8):
        os.pwrite(fd, chance.randbytes(POPULATED // 16), chance.randrange(TIB // MIB) * MIB)
    before = os.fstat(fd).st_blocks
    spec: dict[str, Any] = {"name": "s", "id": "m", "size": TIB, "memory": {"fd": fd}}
    with running("save", spec, tmp_path, [fd]) as engine:
        engine.heard("ready")
        engine.tell({"pass": {"dirty": None}})
        peaks = [finished(engine, "passed")]
        engine.tell({"finish": MEMBERS})
        peaks.append(finished(engine, "end"))
    with running("verify", {"name": "s"}, tmp_path, []) as engine:
        peaks.append(finished(engine, "end"))
    with running("restore", {**spec, "memory": {"fd": target}}, tmp_path, [target]) as engine:
        peaks.append(finished(engine, "end"))
    assert os.fstat(fd).st_blocks == before
    assert os.fstat(target).st_blocks == before
    assert max(peaks) < ADDED
    assert (tmp_path / "s" / "memory.raw").stat().st_blocks * 512 < POPULATED + 2 * MIB
    for at in places[::50]:
        assert os.pread(target, PAGE, at) == os.pread(fd, PAGE, at)
    os.close(fd)
    os.close(target)

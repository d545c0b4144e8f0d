"""The engine without a worker process: the same functions, in this process, for tests of thousands of steps."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from gmemd.snapshots.folder import draft
from gmemd.snapshots.restore import restore, verify
from gmemd.snapshots.rewrite import cold, flatten
from gmemd.snapshots.save import STATE, Saving
from gmemd.snapshots.source import Memory
from gmemd.snapshots.stored import Stored
from tests.snapshots.engine import MEMBERS, opened

VERBS = {"verify": verify, "flatten": flatten, "cold": cold}


def save_here(root: Path, name: str, fd: int, parent: str = "", state: bytes = b"") -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(opened(root))
        base = stack.enter_context(Stored(folder, parent)) if parent else None
        made = stack.enter_context(draft(folder, name))
        size = os.fstat(fd).st_size
        saving = Saving(made, name, size, base)
        stack.callback(saving.close)
        saving.add("memory", Memory(fd, 0, size, "m"))
        for _ in saving.take(None):
            pass
        if state:
            (root / made.name / STATE).write_bytes(state)
        saving.finish(dict(MEMBERS))
        made.publish()


def do_here(verb: str, root: Path, name: str) -> None:
    with opened(root) as folder:
        for _ in VERBS[verb]({"root": folder, "name": name}):
            pass


def restore_here(root: Path, name: str, fd: int) -> None:
    with opened(root) as folder:
        spec: dict[str, Any] = {"root": folder, "name": name, "id": "m", "memory": {"fd": fd}}
        for _ in restore(spec):
            pass

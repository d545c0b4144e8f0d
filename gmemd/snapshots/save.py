"""Saving: a draft is written in passes while the daemon holds the guest for the last one, then finished and published.

What the worker of the verb `save` says and hears, in this order (each a line of JSON):
    says  {"total": BYTES, "folder": DRAFT, "id": UUID}     then {"done": BYTES} as it goes
    says  {"ready": true}                        after a first pass, if "live"; the daemon stops the guest now
    hears {"pass": {"dirty": [[OFFSET, BYTES], ...] or null}}
    says  {"passed": true, "bytes": BYTES}                  the daemon may let the guest go on
    hears {"pass": ...} again, or {"finish": {MEMBERS}}     the members of the manifest that the daemon knows
    says  {"end": true, "id": UUID, "bytes": BYTES}         it is published and durable
If the other end closes before `finish`, the draft is removed. Between `ready` and `finish` the daemon may write the
file `vmstate` into the draft. A pass with `dirty` looks only at these ranges: nothing else may have changed since the
pass before it, or, before any pass, since the parent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from typing import Any, Final

from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.kernel.worker import heard
from gmemd.snapshots import manifest
from gmemd.snapshots.cold import ColdHalf
from gmemd.snapshots.folder import Draft, check_name, draft
from gmemd.snapshots.half import Dirty, Half, dirty_blocks
from gmemd.snapshots.pages import BLOCK, PAGE
from gmemd.snapshots.protected import Protected
from gmemd.snapshots.source import Memory, Source
from gmemd.snapshots.stored import Stored
from gmemd.snapshots.tables import sha256_of, write_fully

STATE: Final = "vmstate"  # the file of a VMM's device state

Message = dict[str, Any]
Talk = Generator[Message, None, Message]  # what is said; returns what the last message holds


class Saving:
    """A snapshot that is being written: halves with what they are read from."""

    def __init__(self, draft_: Draft, name: str, size: int, parent: Stored | None = None) -> None:
        self.id = manifest.new_id()
        self._draft, self._name, self._size, self._parent = draft_, name, size, parent
        self._halves: dict[str, tuple[Half | ColdHalf, Source]] = {}
        self._passed = False
        if parent is not None and parent.size != size:
            raise QmpError(f"snapshot '{parent.name}' is of {parent.size} bytes, and not of {size}")

    def add(self, part: str, source: Source) -> None:
        """Save a part from there."""
        base = self._parent.parts.get(part) if self._parent is not None else None
        if base is not None and not base.whole:
            assert self._parent is not None
            raise QmpError(f"snapshot '{self._parent.name}' cannot be a parent: it is not stored in full")
        self.put(part, Half(self._draft.fd, part, self._size, self._name, base), source)

    def put(self, part: str, half: Half | ColdHalf, source: Source) -> None:
        """Write a part with this writer, which is closed with the others."""
        self._halves[part] = half, source

    def close(self) -> None:
        """Close the files."""
        for half, _ in self._halves.values():
            half.close()

    def total(self) -> int:
        """About how many bytes a pass reads."""
        return sum(source.total() for _, source in self._halves.values())

    def take(self, ranges: list[list[int]] | None, *, again: bool = False) -> Iterator[int]:
        """One pass over every part; `ranges`, [[offset, bytes]] of the memory, as in `pass`.

        `again`: another pass will follow.
        """
        if ranges is not None and not self._passed and self._parent is None:
            raise QmpError(f"snapshot '{self._name}' has no parent since which pages are dirty")
        for part, (half, source) in self._halves.items():
            dirty: Dirty | None = None
            if ranges is not None and part == "memory" and (self._passed or half.stored != "full"):
                dirty = dirty_blocks(ranges, self._size)
            with source.still() if isinstance(source, Protected) else contextlib.nullcontext():
                yield from half.take(source, dirty, again=again)
        self._passed = True

    def finish(self, members: Message) -> int:
        """Make everything durable and write the manifest; the bytes that the snapshot takes."""
        parts = {part: half.finish() for part, (half, _) in self._halves.items()}
        parts = {**members.pop("parts", {}), **parts}
        whole: Message = {
            "format": manifest.FORMAT, "version": manifest.VERSION, "id": self.id, "name": self._name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "writer": "gmemd",
            "page-size": PAGE, "block-size": BLOCK, "generation": 0, **members, "parts": parts}
        whole["object"] = {**whole["object"], "size": self._size}
        if self._parent is not None:
            whole["parent"] = {"id": self._parent.manifest["id"], "name": self._parent.name,
                               "sha256": self._parent.sha256}
        with os_errors(f"cannot write snapshot '{self._name}'"):
            state = self._state(whole.pop("device-state", {}))
            if state is not None:
                whole["device-state"] = state
            problem = manifest.check({**whole, "sha256": "0" * 64})
            if problem:
                raise QmpError(f"snapshot '{self._name}': {problem}")
            self._write(manifest.NAME, manifest.dump(whole))
        size: int = sum([part["bytes"] for part in parts.values()])
        return size + (state["bytes"] if state is not None else 0)

    def _state(self, members: Message) -> Message | None:
        """The entry of the device state, durable; None: there is none."""
        try:
            fd = open_beneath(self._draft.fd, STATE, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.fsync(fd)
            size = os.fstat(fd).st_size
            return {**members, "file": STATE, "bytes": size, "sha256": sha256_of(fd, size)}
        finally:
            close_fd(fd)

    def _write(self, name: str, data: bytes) -> None:
        fd = open_beneath(self._draft.fd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            write_fully(fd, memoryview(data), 0)
            os.fsync(fd)
        finally:
            close_fd(fd)


def save(spec: Message) -> Talk:
    """Save the memory of an object as snapshot `name` below the folder `root`.

    {"root": fd, "name", "size": bytes, "id": the object's, "memory": {"fd", "offset"}?, "private": {"fd"}?,
    "parent": name?, "live": bool?}; without `memory`, only what the daemon writes is saved. `memory` with the members
    "uffd": fd and "address" of a holder that goes on writing: what a pass reads is then of one moment.
    """
    root, name = spec["root"], spec["name"]
    check_name(name)
    with contextlib.ExitStack() as opened:
        parent = opened.enter_context(Stored(root, spec["parent"])) if "parent" in spec else None
        with os_errors(f"cannot create snapshot '{name}'"):
            made = opened.enter_context(draft(root, name))
        saving = Saving(made, name, spec["size"], parent)
        opened.callback(saving.close)
        for part in ("memory", "private"):
            if part in spec:
                where = spec[part]
                place = where["fd"], where.get("offset", 0), spec["size"], spec["id"]
                saving.add(part, Protected(*place, where["uffd"], where["address"]) if "uffd" in where
                           else Memory(*place))
        yield {"total": saving.total(), "folder": made.name, "id": saving.id}
        done = 0
        if spec.get("live"):
            done = yield from progress(saving.take(None, again=True), done)
        yield {"ready": True}
        return (yield from _conclude(saving, made, name, done))


def progress(counts: Iterator[int], done: int) -> Generator[Message, None, int]:
    """Say how far a pass has come; the bytes that have been read by all passes."""
    for count in counts:
        done += count
        yield {"done": done}
    return done


def _conclude(saving: Saving, made: Draft, name: str, done: int) -> Talk:
    """Do what the daemon says until the snapshot is published."""
    while True:
        told = heard()
        if told is None:
            raise QmpError(f"snapshot '{name}' was given up")
        if "finish" in told:
            break
        before = done
        done = yield from progress(saving.take(told["pass"].get("dirty")), done)
        yield {"passed": True, "bytes": done - before}
    size = saving.finish(told["finish"])
    with os_errors(f"cannot publish snapshot '{name}'"):
        made.publish()
    return {"id": saving.id, "bytes": size}


VERBS: Final = {"save": save}

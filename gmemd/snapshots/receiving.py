"""Receiving an object's memory, and comparing it before anybody may use it.

`stream-head` {"in": FD} reads the HEAD and not a byte more; it ends with {"head": {..}, "check": HEX}, which is where
`stream-receive` goes on: {"parts": [[FD, OFFSET, BYTES]..], "in": FD, "out": FD or -1, "state": FD, "check":
HEX}; "out" is -1 for a stream that nobody answers. The memory is new: full of zeros. It says, and is told:

    {"done": BYTES}
    {"complete": {..}}        the members of ENDS; every digest is right
      {"durable": {..}}       only on a line, as the rest
    {"your": {..}} or {"keep": {..}}
      {"done": {..}}

`stream-fail` {"out": FD, "desc": SENTENCE} only says that this side gives up, after the HEAD. `stream-answer` {"in":
FD, "out": FD, "check": HEX, "answer": {..}} answers a question, and yields {"told": {..}}, or {"told": {}} if the line
is cut. `stream-ask` {"in": FD, "out": FD, "head": {..}} asks one and yields {"answer": {..}}; told {"done": {..}} it
says DONE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.snapshots.pages import BLOCK, NOTHING, PAGE, from_bits, runs
from gmemd.snapshots.restore import Target
from gmemd.snapshots.stream import Cut, Frame, Gone, Receiver, Sender, Table, check_head, told
from gmemd.snapshots.tables import write_fully

_REPORT: Final = 32 << 20  # bytes between two reports of progress

Message = dict[str, Any]


class Part:
    """A part of an object as it is received: new memory, full of zeros; borrows the descriptor."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        """offset: where it begins in the file, in bytes."""
        self.table = Table(size)
        self._size = size
        self._target = Target(fd, offset, "the object")

    def put(self, frame: Frame) -> None:
        """Compare a block with its digest, and write it; QmpError if it is wrong."""
        from xxhash import xxh3_128_digest

        where, length = frame.where, min(BLOCK, self._size - frame.where)
        if where % BLOCK or length <= 0 or frame.pages >> length // PAGE:
            raise QmpError(f"the stream is damaged: it has a block at {where}")
        mask = from_bits(frame.pages.to_bytes(2, "little"), length // PAGE)
        block = _spread(frame.payload, mask)
        if (xxh3_128_digest(block) if frame.pages else NOTHING) != frame.digest:
            raise QmpError(f"the stream is damaged: the digest of the block at {where} is wrong")
        if self.table.get(where) != NOTHING:
            for at, count in runs(bytes(not page for page in mask)):
                self._target.zero(where + at, count)
        self._target.write(where, memoryview(block))
        self.table.put(where, frame.digest)


def _spread(payload: bytearray, mask: bytearray) -> bytearray:
    """The whole block: the pages of the payload where the mask says."""
    if all(mask):
        return payload
    block, taken = bytearray(len(mask) * PAGE), 0
    for at, count in runs(mask):
        block[at:at + count] = payload[taken:taken + count]
        taken += count
    return block


class Receiving:
    """One object being received."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._receiver = Receiver(spec["in"], spec["check"])
        self._sender = Sender(spec["out"]) if spec["out"] >= 0 else None
        self._parts = [Part(*part) for part in spec["parts"]]
        self._state_fd: int = spec["state"]
        self._state = hashlib.sha256()
        self._state_bytes = 0

    def run(self) -> Iterator[Message]:
        try:
            yield from self._run()
        except (QmpError, OSError) as exc:
            if self._sender is not None and not isinstance(exc, Cut):
                desc = exc.desc if isinstance(exc, QmpError) else exc.strerror
                with suppress(Gone):
                    self._sender.say("FAIL", {"desc": desc})
            raise

    def _run(self) -> Iterator[Message]:
        if self._sender is not None:
            self._sender.say("TAKE", {})
        ends = yield from self._fill()
        if [part.table.sha256() for part in self._parts] != ends.get("digests"):
            raise QmpError("the stream is damaged: what was received is not what was sent")
        if self._state_bytes and ends.get("state") != {"bytes": self._state_bytes, "sha256": self._state.hexdigest()}:
            raise QmpError("the stream is damaged: the device state is not what was sent")
        yield {"complete": ends}
        if self._sender is not None:
            yield from self._settle(self._sender)

    def _fill(self) -> Generator[Message, None, Message]:
        """Receive until the end; the members of ENDS."""
        done = reported = 0
        while True:
            frame = self._receiver.expect("DATA", "STAT", "ENDS")
            if frame.kind == "ENDS":
                yield {"done": done}
                return frame.members()
            if frame.kind == "STAT":
                self._keep_state(frame.payload)
                continue
            if frame.part >= len(self._parts):
                raise QmpError(f"the stream is damaged: it has no part {frame.part}")
            self._parts[frame.part].put(frame)
            done += len(frame.payload)
            if done - reported >= _REPORT:
                reported = done
                yield {"done": done}

    def _keep_state(self, piece: bytearray) -> None:
        write_fully(self._state_fd, memoryview(piece), self._state_bytes)
        self._state.update(piece)
        self._state_bytes += len(piece)

    def _settle(self, sender: Sender) -> Iterator[Message]:
        sender.say("DURA", told("durable"))
        frame = self._receiver.expect("YOUR", "KEEP")
        yield {frame.kind.lower(): frame.members()}
        if frame.kind == "YOUR":
            sender.say("DONE", told("done"))


def _head(spec: dict[str, Any]) -> Generator[Message, None, Message]:
    receiver = Receiver(spec["in"])
    head = check_head(receiver.frame())
    yield from ()
    return {"head": head, "check": receiver.check}


def _fail(spec: dict[str, Any]) -> Iterator[Message]:
    Sender(spec["out"]).say("FAIL", {"desc": spec["desc"]})
    yield from ()


def _answer(spec: dict[str, Any]) -> Iterator[Message]:
    Sender(spec["out"]).say("ANSW", spec["answer"])
    try:
        yield {"told": Receiver(spec["in"], spec["check"]).expect("DONE").members()}
    except Cut:
        yield {"told": {}}


def _ask(spec: dict[str, Any]) -> Iterator[Message]:
    sender = Sender(spec["out"])
    sender.say("HEAD", spec["head"])
    yield {"answer": Receiver(spec["in"]).expect("ANSW").members()}
    sender.say("DONE", told("done"))


VERBS = {"stream-head": _head, "stream-receive": lambda spec: Receiving(spec).run(), "stream-fail": _fail,
         "stream-answer": _answer, "stream-ask": _ask}

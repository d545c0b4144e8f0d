"""Sending an object's memory: rounds while others write, then a last one while nobody does.

What changed since the round before is found by the digests of all blocks that exist, so it does not matter who wrote,
and how. What is sent is a copy of a block, and its digest that of the copy.

`stream-send` takes {"parts": [[FD, OFFSET, BYTES]..], "out": FD, "in": FD or -1, "state": FD or -1, "head": {..},
"rounds": N, "downtime": MILLISECONDS}; "in" is -1 for a stream that nobody answers. It says, and is told:

    {"done": BYTES}, {"total": BYTES}     progress
    {"ready": BYTES}                      nobody may write from now on until it has {"passed": BYTES}
      {"pass": {"state": BYTES}}
    {"passed": BYTES}                     all that is to be sent was read
      {"finish": {..}}                    further members of ENDS
    {"durable": {..}}                     what the destination says; only on a line
      {"your": {..}} or {"keep": {..}}
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from time import monotonic
from typing import Any, Final, NamedTuple

from gmemd.kernel.worker import heard
from gmemd.snapshots.buffers import Buffers
from gmemd.snapshots.pages import BLOCK, CHUNK, NOTHING, PAGE, WINDOW, filled, runs, to_bits
from gmemd.snapshots.source import Memory
from gmemd.snapshots.stream import Gone, Receiver, Sender, Table, place_of, told
from gmemd.snapshots.tables import sha256_of

_STATE_PIECE: Final = 1 << 20  # bytes
_REPORT: Final = 32 << 20  # bytes between two reports of progress
_SLOWER: Final = 0.8  # a round that leaves more than this part of the one before does not help

Message = dict[str, Any]


class Block(NamedTuple):
    """A block that has changed; `data` is valid until the next one."""

    where: int
    digest: bytes
    pages: int
    data: list[memoryview]


class Part:
    """A part of an object as it is sent; borrows the descriptor."""

    def __init__(self, number: int, fd: int, offset: int, size: int) -> None:
        """offset: where it begins in the file, in bytes."""
        self.number = number
        self.table = Table(size)
        self._memory = Memory(fd, offset, size, "the object")
        self._buffers = Buffers()

    def changed(self) -> Iterator[Block]:
        """Each block that is not as it was when it was last yielded, ascending; at first all are zeros."""
        for window in sorted({*self._memory.windows(), *self.table.windows()}):
            piece = self.table.piece(window)
            before = bytes(piece)
            for begin, view in self._chunks(window):
                yield from _changed(begin, view, piece)
            if piece != before:
                self.table.replace(window, piece)

    def _chunks(self, window: int) -> Iterator[tuple[int, memoryview]]:
        """The contents of a window, chunk by chunk, each with its offset."""
        end = min((window + 1) * WINDOW, self._memory.size)
        for at in range(window * WINDOW, end, CHUNK):
            view = self._buffers.data[:min(CHUNK, end - at)]
            self._memory.read(at, view)
            yield at, view


def _changed(begin: int, view: memoryview, piece: bytearray) -> Iterator[Block]:
    """The blocks of a chunk that differ from the digests of their window, which are then replaced."""
    from xxhash import xxh3_128_digest

    mask = filled(view)
    for at in range(0, len(view), BLOCK):
        data, pages = view[at:at + BLOCK], mask[at // PAGE:(at + BLOCK) // PAGE]
        digest = xxh3_128_digest(data) if any(pages) else NOTHING
        place = place_of(begin + at)
        if digest != piece[place:place + len(NOTHING)]:
            piece[place:place + len(NOTHING)] = digest
            yield Block(begin + at, digest, int.from_bytes(to_bits(pages), "little"),
                        [data[start:start + count] for start, count in runs(pages)])


class Sending:
    """One object being sent."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec = spec
        self._sender = Sender(spec["out"])
        self._answers = Receiver(spec["in"]) if spec["in"] >= 0 else None
        self._parts = [Part(number, *part) for number, part in enumerate(spec["parts"])]
        self._done = self._reported = 0  # bytes

    def run(self) -> Iterator[Message]:
        try:
            yield from self._run()
        except Gone:
            if self._answers is not None:
                self._answers.expect()  # why the other side has gone, if it has said so
            raise

    def _run(self) -> Iterator[Message]:
        self._sender.say("HEAD", self._spec["head"])
        if self._answers is not None:
            self._answers.expect("TAKE")
        left = yield from self._rounds()
        yield {"ready": left}
        state = told("pass").get("state", 0)
        before = self._done
        yield from self._pass()
        self._send_state(state)
        yield {"passed": self._done - before}
        self._sender.say("ENDS", {"digests": [part.table.sha256() for part in self._parts], **self._state(state),
                                  **told("finish")})
        if self._answers is not None:
            yield from self._settle(self._answers)

    def _rounds(self) -> Generator[Message, None, int]:
        """Send until so little is left that the last round is short; the bytes of the latest round."""
        sent = 0
        for number in range(self._spec["rounds"]):
            begun, last, before = monotonic(), sent, self._done
            yield from self._pass()
            sent = self._done - before
            if number == 0:
                rate = sent / max(monotonic() - begun, 1e-6)  # bytes a second, with reading and digests
            if sent <= rate * self._spec["downtime"] / 1000 or (number and sent > last * _SLOWER):
                break
            yield {"total": self._done + sent}
        return sent

    def _pass(self) -> Iterator[Message]:
        for part in self._parts:
            for block in part.changed():
                self._sender.block(part.number, block.where, block.digest, block.pages, block.data)
                self._done += block.pages.bit_count() * PAGE
                if self._done - self._reported >= _REPORT:
                    self._reported = self._done
                    yield {"done": self._done}
        yield {"done": self._done}

    def _send_state(self, size: int) -> None:
        for at in range(0, size, _STATE_PIECE):
            self._sender.state(os.pread(self._spec["state"], min(_STATE_PIECE, size - at), at))

    def _state(self, size: int) -> dict[str, Any]:
        if not size:
            return {}
        return {"state": {"bytes": size, "sha256": sha256_of(self._spec["state"], size)}}

    def _settle(self, answers: Receiver) -> Iterator[Message]:
        """The end of a move: the destination has it, the source gives it up or not, the destination owns it or not."""
        yield {"durable": answers.expect("DURA").members()}
        decision = heard() or {}
        if "your" not in decision:
            self._sender.say("KEEP", decision.get("keep", {}))
            return
        self._sender.say("YOUR", decision["your"])
        answers.expect("DONE")


VERBS = {"stream-send": lambda spec: Sending(spec).run()}

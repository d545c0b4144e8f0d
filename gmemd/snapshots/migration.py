"""QEMU's own live migration, divided as it arrives: pages of one RAM block, and all the rest.

The stream, as QEMU 7.2 to 11.1 write it to a pipe (migration/savevm.c, migration/ram.c): a header and the
configuration; the start of the section "ram", which lists the blocks; its parts and its end, which hold pages, again
and again those that the guest writes; then the state of the devices. Numbers are big-endian.

What is left without the pages of a block is such a stream, too. QEMU loads it without x-ignore-shared, and leaves
alone the memory that it has no pages of: so that must hold them already.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Collection, Generator, Iterator
from typing import Any, Final, Protocol

from gmemd.errors import QmpError
from gmemd.kernel import syscalls, uapi
from gmemd.kernel.worker import heard
from gmemd.snapshots.tables import write_fully

PAGE: Final = 4096  # bytes of a page of the target

# bits of the word before a page, whose other bits are its place in the block
_ZERO, _SIZES, _DATA, _END, _SAME = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS: Final = PAGE - 1

_START, _PART, _LAST, _COMMAND, _FOOTER = 0x01, 0x02, 0x03, 0x08, 0x7E  # types of sections
_RAM: Final = b"\x03ram" + struct.pack(">II", 0, 4)  # name, instance, version
_BEGINNING: Final = 1 << 16  # bytes in which the RAM's section begins
_CHUNK: Final = 1 << 20  # bytes of a read
_RUN: Final = 512  # pages passed on at a time; pwritev(2) takes 1024

_WORD: Final = struct.Struct(">Q")
_NUMBER: Final = struct.Struct(">I")


class NotUnderstood(Exception):
    """The stream is not one that can be divided; the message says why."""


class CutShort(NotUnderstood):
    """The stream ends before the state of the devices: whoever sends it has given up."""


class Pages(Protocol):
    """Where the block's pages go; a page may come again, and the last one is what counts."""

    def put(self, offset: int, pages: list[memoryview]) -> None:
        """Take pages one after the other; their memory is reused after the call."""

    def clear(self, offset: int, count: int) -> None:
        """So many pages are zero."""


def divide(source: int, blocks: Collection[str], pages: Pages, rest: Callable[[memoryview | bytes], object]
           ) -> Generator[int, None, int]:
    """Read a stream from a descriptor to its end; yields the bytes read so far, at times, and returns the block's size.

    `blocks`: names of which the block has one. `rest` gets the stream without the block's pages.
    NotUnderstood, CutShort, OSError.
    """
    stream = _Stream(source)
    identity = _find_ram(stream, rest)
    ram = _Ram(stream, blocks, pages, rest)
    yield from ram.sections(identity)
    more = 0
    while data := stream.rest():
        rest(data)
        more += len(data)
    if not more:
        raise CutShort("the migration stream ends before the state of the devices")
    return ram.size


class _Stream:
    """A descriptor that is read ahead."""

    def __init__(self, source: int) -> None:
        self.data = bytearray()
        self.at = 0  # of what is not taken yet
        self.count = 0  # bytes read so far
        self._source = source

    def need(self, count: int) -> None:
        """Have so many bytes there; NotUnderstood at the end."""
        while len(self.data) - self.at < count:
            if not self._more():
                raise CutShort("the migration stream ends early")

    def take(self, count: int) -> memoryview:
        """The next bytes, which stay where they are until `need`."""
        self.need(count)
        self.at += count
        return memoryview(self.data)[self.at - count:self.at]

    def is_next(self, word: bytes, size: int) -> bool:
        """Whether these bytes come next, then `size` more, all in what was read ahead; a single one must be 0."""
        return len(self.data) - self.at >= len(word) + size and self.data.startswith(word, self.at) \
            and (size > 1 or not self.data[self.at + len(word)])

    def rest(self) -> bytes:
        """What comes next, b"" at the end."""
        if self.at == len(self.data) and not self._more():
            return b""
        data = bytes(self.data[self.at:])
        self.at = len(self.data)
        return data

    def _more(self) -> bool:
        data = os.read(self._source, _CHUNK)
        self.data = self.data[self.at:] + data  # a new one: views of the old one may be in use
        self.at = 0
        self.count += len(data)
        return bool(data)


def _find_ram(stream: _Stream, rest: Callable[[bytes], object]) -> bytes:
    """Pass on what is before the blocks' list; return the number of the section, as it stands there."""
    if bytes(stream.take(8)) != b"QEVM" + _NUMBER.pack(3):
        raise NotUnderstood("this is not a migration stream of QEMU")
    stream.at = 0
    while (found := stream.data.find(_RAM)) < 0:
        if len(stream.data) > _BEGINNING:
            raise NotUnderstood("the migration stream has no RAM")
        stream.need(len(stream.data) + 1)
    head = bytes(stream.take(found + len(_RAM)))
    if found < 5 or head[found - 5] != _START:
        raise NotUnderstood("the migration stream has no RAM")
    rest(head)
    return head[found - 4:found]


class _Ram:
    """The sections of the RAM."""

    def __init__(self, stream: _Stream, blocks: Collection[str], pages: Pages,
                 rest: Callable[[memoryview | bytes], object]) -> None:
        self.size = 0  # bytes of the block
        self._stream, self._pages, self._rest = stream, pages, rest
        self._blocks = {block.encode() for block in blocks}
        self._is_ours = False  # the page before was the block's

    def sections(self, identity: bytes) -> Iterator[int]:
        """Divide them, up to the end of the last one; yields the bytes read so far."""
        self._records(identity)
        if not self.size:
            raise NotUnderstood(f"the migration stream has no RAM block '{min(self._blocks).decode()}'")
        while True:
            kind = self._stream.take(1)[0]
            if kind == _COMMAND:
                self._command()
                continue
            if kind not in (_PART, _LAST) or (number := bytes(self._stream.take(4))) != identity:
                raise NotUnderstood("the migration stream has more than RAM before the state of the devices")
            self._rest(bytes([kind]) + number)
            self._records(identity)
            yield self._stream.count
            if kind == _LAST:
                return

    def _command(self) -> None:
        head = bytes(self._stream.take(4))
        self._rest(bytes([_COMMAND]) + head + bytes(self._stream.take(int.from_bytes(head[2:], "big"))))

    def _records(self, identity: bytes) -> None:
        """Divide what a section holds, and pass on its footer."""
        stream = self._stream
        while True:
            [word] = _WORD.unpack(stream.take(8))
            if word & _SIZES:
                self._rest(_WORD.pack(word))
                self._sizes(word & ~_FLAGS)
            elif word & (_DATA | _ZERO):
                self._page(word)
            elif word & _END:
                self._rest(_WORD.pack(word))
                break
            else:
                raise NotUnderstood(f"the migration stream has pages of an unknown form, {word & _FLAGS:#x}")
        footer = bytes(stream.take(5))
        if footer != bytes([_FOOTER]) + identity:
            raise NotUnderstood("a section of the migration stream does not end where it should")
        self._rest(footer)

    def _sizes(self, total: int) -> None:
        while total > 0:
            length = self._stream.take(1)[0]
            entry = bytes(self._stream.take(length + 8))
            [size] = _WORD.unpack_from(entry, length)
            if entry[:length] in self._blocks:
                self.size = size
            self._rest(bytes([length]) + entry)
            total -= size

    def _page(self, word: int) -> None:
        """Pass on a page, and those that follow it in the block and are already here."""
        stream, head = self._stream, _WORD.pack(word)
        if not word & _SAME:
            length = stream.take(1)[0]
            name = bytes(stream.take(length))
            self._is_ours = name in self._blocks
            head += bytes([length]) + name
        size = 1 if word & _ZERO else PAGE
        body = stream.take(size)
        if not self._is_ours:
            self._rest(head + bytes(body))
            return
        if word & _ZERO and body[0]:
            raise NotUnderstood("the migration stream has a page of repeated bytes")
        offset, run = word & ~_FLAGS, [body]
        following = (word | _SAME) + PAGE
        while len(run) < _RUN and stream.is_next(_WORD.pack(following), size):
            run.append(stream.take(8 + size)[8:])
            following += PAGE
        if offset + len(run) * PAGE > self.size:
            raise NotUnderstood("the migration stream has a page behind the end of its block")
        if word & _ZERO:
            self._pages.clear(offset, len(run))
        else:
            self._pages.put(offset, run)


class _File:
    """The pages of a block in a file: those that are zero are holes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def put(self, offset: int, pages: list[memoryview]) -> None:
        if os.pwritev(self._fd, pages, offset) < len(pages) * PAGE:  # it fails for good when the rest is written
            write_fully(self._fd, memoryview(b"".join(pages)), offset)

    def clear(self, offset: int, count: int) -> None:
        syscalls.fallocate(self._fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, offset, count * PAGE)


Message = dict[str, Any]


def receive(spec: Message) -> Generator[Message, None, Message]:
    """Divide a stream, {"stream": fd, "memory": fd, "state": fd, "size": bytes}, when told {"blocks": [name, ...]}.

    The pages go into the file `memory`, which is empty, at their places; the rest into the file `state`. Returns the
    bytes of that, nothing if the stream was cut short.
    """
    def rest(data: memoryview | bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(spec["state"], left):]

    with contextlib.suppress(OSError):  # the user has too many pipes as large
        fcntl.fcntl(spec["stream"], fcntl.F_SETPIPE_SZ, _CHUNK)
    os.ftruncate(spec["memory"], spec["size"])
    if (told := heard()) is None:
        return {}
    try:
        size = yield from _said(divide(spec["stream"], told["blocks"], _File(spec["memory"]), rest))
    except CutShort:
        return {}
    except NotUnderstood as exc:
        raise QmpError(str(exc)) from exc
    if size != spec["size"]:
        raise QmpError(f"the RAM that the VMM sends has {size} bytes, and the object {spec['size']}")
    return {"bytes": os.fstat(spec["state"]).st_size}


def _said(counts: Generator[int, None, int]) -> Generator[Message, None, int]:
    while True:
        try:
            done = next(counts)
        except StopIteration as ended:
            return int(ended.value)
        yield {"done": done}


VERBS: Final = {"receive": receive}

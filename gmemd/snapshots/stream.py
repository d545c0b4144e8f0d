"""The stream: an object's memory on its way to a file or to another gmemd, checked frame by frame.

A stream is a sequence of frames, each a header of 40 bytes, big-endian, and a payload:

    kind     4 bytes   capital letters, below
    pages    uint16    DATA: which pages of the block follow, the first one in the lowest bit; others are zeros
    part     uint16    DATA: 0 the memory, 1 the private bytes set aside for it
    where    uint64    DATA: the offset of the block in the object; else the bytes of the payload
    digest   16 bytes  DATA: xxh3_128 of the whole block, zeros included, 0 for a block of zeros; else of the payload
    check    uint64    xxh3_64 of the `check` before (0 for the first) and these 32 bytes

So a lost, repeated or exchanged frame is noticed at the next header, and a flipped bit in the frame itself. The payload
of DATA is the pages that `pages` names, of 4096 bytes each; STAT is a part of the device state; that of all others is
a JSON object. A block has 64 KiB, the last one of an object perhaps less. A later DATA replaces an earlier one.

    HEAD   first: format, version, purpose (copy, move or resolve), id, object
    DATA, STAT
    ENDS   last, and only if everything was sent: digests (sha256 of each part's table of block digests), state, ...

What answers exists only on a line between two gmemd, and is framed in the same way in each direction:

    TAKE   the destination has room and has made the object
    DURA   it has everything, compared and durable, and will not use it before it is told
    YOUR   the source has given the object up, durably
    KEEP   the source keeps it, durably
    DONE   the destination owns it, durably
    ANSW   the answer to a HEAD with the purpose resolve
    FAIL   whoever says it gives up, and why
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import Any, Final, NamedTuple
from weakref import finalize

from gmemd.errors import QmpError
from gmemd.kernel.worker import heard
from gmemd.snapshots.pages import BLOCK, NOTHING, PAGE, WINDOW
from gmemd.snapshots.tables import sha256_of, windows_of_data

FORMAT: Final = "gmemd-stream"
VERSION: Final = 1
_DIGEST: Final = len(NOTHING)
_LONGEST: Final = 16 << 20  # bytes of a JSON payload, or of a piece of device state

_HEADER: Final = Struct(">4sHHQ16s")
_CHECK: Final = Struct(">Q")
_START: Final = bytes(_CHECK.size)
_KINDS: Final = frozenset((b"HEAD", b"DATA", b"STAT", b"ENDS", b"TAKE", b"DURA", b"YOUR", b"KEEP", b"DONE", b"ANSW",
                           b"FAIL"))


class Cut(QmpError):
    """The stream ends before it is complete."""

    def __init__(self) -> None:
        super().__init__("the stream ends early")


class Gone(QmpError):
    """Nobody reads the stream any more."""

    def __init__(self) -> None:
        super().__init__("nobody reads the stream any more")


class Frame(NamedTuple):
    """A checked frame; the digest of DATA is not checked yet."""

    kind: str
    pages: int
    part: int
    where: int
    digest: bytes
    payload: bytearray

    def members(self) -> dict[str, Any]:
        """The JSON object of its payload."""
        try:
            found = json.loads(self.payload)
        except (ValueError, RecursionError) as exc:
            raise QmpError(f"the stream is damaged: {self.kind} is not JSON") from exc
        if not isinstance(found, dict):
            raise QmpError(f"the stream is damaged: {self.kind} is not an object")
        return found


class Sender:
    """Writes frames to a descriptor, which it borrows; Gone or OSError where that fails."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._check = _START

    def block(self, part: int, where: int, digest: bytes, pages: int, data: Sequence[memoryview]) -> None:
        """Send a block: the pages that it says."""
        self._send(_HEADER.pack(b"DATA", pages, part, where, digest), data)

    def state(self, piece: bytes) -> None:
        """Send a piece of the device state."""
        self._payload(b"STAT", piece)

    def say(self, kind: str, members: dict[str, Any]) -> None:
        """Send a frame with a JSON object."""
        self._payload(kind.encode(), json.dumps(members).encode())

    def _payload(self, kind: bytes, payload: bytes) -> None:
        from xxhash import xxh3_128_digest

        self._send(_HEADER.pack(kind, 0, 0, len(payload), xxh3_128_digest(payload)), [memoryview(payload)])

    def _send(self, header: bytes, data: Sequence[memoryview]) -> None:
        self._check = _checked(self._check, header)
        buffers = [memoryview(header + self._check), *data]
        while buffers:
            try:
                count = os.writev(self._fd, buffers)
            except BlockingIOError:  # as another process has set it
                _wait(self._fd, select.POLLOUT)
                continue
            except (BrokenPipeError, ConnectionResetError) as exc:
                raise Gone from exc
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]


class Receiver:
    """Reads frames from a descriptor, which it borrows, and never a byte beyond the frame."""

    def __init__(self, fd: int, check: str = "") -> None:
        """check: where an earlier Receiver of the same stream has got to (its `check`)."""
        self._fd = fd
        self._check = bytes.fromhex(check) if check else _START

    @property
    def check(self) -> str:
        """Where it has got to, for another one that goes on."""
        return self._check.hex()

    def frame(self) -> Frame:
        """Wait for the next frame. Cut: there is none; QmpError: it is damaged; OSError."""
        whole = self._read(_HEADER.size + _CHECK.size)
        header = bytes(whole[:_HEADER.size])
        kind, pages, part, where, digest = _HEADER.unpack(header)
        check = _checked(self._check, header)
        if check != whole[_HEADER.size:]:
            known = self._check != _START or kind in _KINDS
            raise QmpError("the stream is damaged" if known else "this is not a stream of gmemd")
        self._check = check
        if kind not in _KINDS:
            raise QmpError(f"the stream has a frame that this version does not know: {kind!r}")
        if kind == b"DATA":
            return Frame("DATA", pages, part, where, digest, self._read(pages.bit_count() * PAGE))
        if where > _LONGEST:
            raise QmpError(f"the stream is damaged: {kind.decode()} of {where} bytes")
        payload = self._read(where)
        _compare(payload, digest, kind.decode())
        return Frame(kind.decode(), pages, part, where, digest, payload)

    def expect(self, *kinds: str) -> Frame:
        """The next frame, which has to be one of these; QmpError, and what the other side says where it gives up."""
        frame = self.frame()
        if frame.kind == "FAIL" and "FAIL" not in kinds:
            raise QmpError(f"the other side gives up: {frame.members().get('desc', '')}")
        if frame.kind not in kinds:
            raise QmpError(f"the stream has {frame.kind} where {' or '.join(kinds)} belongs")
        return frame

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            try:
                found = os.readv(self._fd, [view[done:]])
            except BlockingIOError:
                _wait(self._fd, select.POLLIN)
                continue
            except ConnectionResetError as exc:
                raise Cut from exc
            if not found:
                raise Cut
            done += found
        return data


def _wait(fd: int, what: int) -> None:
    poll = select.poll()
    poll.register(fd, what)
    poll.poll()


def _checked(before: bytes, header: bytes) -> bytes:
    from xxhash import xxh3_64_intdigest

    return _CHECK.pack(xxh3_64_intdigest(before + header))


def _compare(payload: bytearray, digest: bytes, what: str) -> None:
    from xxhash import xxh3_128_digest

    if xxh3_128_digest(payload) != digest:
        raise QmpError(f"the stream is damaged: the digest of {what} is wrong")


def told(word: str) -> dict[str, Any]:
    """Wait for what the daemon tells, which has to be that; QmpError: it gives up."""
    message = heard() or {}
    if word not in message:
        raise QmpError(str(message.get("fail", "given up")))
    members: dict[str, Any] = message[word]
    return members


def check_head(frame: Frame) -> dict[str, Any]:
    """The members of a HEAD; QmpError if it is none of ours, or of a later version."""
    head = frame.members()
    if frame.kind != "HEAD" or head.get("format") != FORMAT:
        raise QmpError("this is not a stream of gmemd")
    version = head.get("version")
    if type(version) is not int or version > VERSION:
        raise QmpError(f"the stream is of version {version}, and this gmemd knows {VERSION}")
    purpose = head.get("purpose", "")
    wrong = [name for name, good in _MEMBERS.items() if name in head and not good(head[name])]
    wrong += [name for name in ("purpose", *_NEEDED.get(str(purpose), ())) if name not in head]
    if not wrong and purpose in ("copy", "move"):
        wrong = [name for name in _OBJECT if name not in head["object"]]
    if wrong:
        raise QmpError(f"the stream is damaged: its HEAD has no valid '{wrong[0]}'")
    return head


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and all([good(value[name]) for name, good in _OBJECT.items() if name in value])


_OBJECT: Final[dict[str, Callable[[Any], bool]]] = {
    "id": _is_text, "qom-type": _is_text, "size": _is_number, "properties": lambda value: isinstance(value, dict)}
_MEMBERS: Final[dict[str, Callable[[Any], bool]]] = {
    "purpose": _is_text, "id": _is_text, "bytes": _is_number, "generation": _is_number, "object": _is_object,
    "parts": lambda value: value in (1, 2)}
_NEEDED: Final = {"copy": ("object",), "move": ("id", "object", "generation"), "resolve": ("id", "state")}


class Table:
    """The digests of a part's blocks, in a sparse file without a name: a hole is blocks of zeros."""

    def __init__(self, size: int) -> None:
        """size: bytes of the part."""
        self._length = (size + BLOCK - 1) // BLOCK * _DIGEST
        self._fd = os.memfd_create("digests", os.MFD_CLOEXEC)
        finalize(self, os.close, self._fd)
        os.ftruncate(self._fd, self._length)

    def piece(self, window: int) -> bytearray:
        """The digests of the blocks of a window, by its number."""
        at = window * PAGE
        return bytearray(os.pread(self._fd, min(PAGE, self._length - at), at))

    def replace(self, window: int, piece: bytearray) -> None:
        """Store a piece again."""
        os.pwrite(self._fd, piece, window * PAGE)

    def get(self, where: int) -> bytes:
        """The digest of the block at an offset in the part."""
        return os.pread(self._fd, _DIGEST, where // BLOCK * _DIGEST)

    def put(self, where: int, digest: bytes) -> None:
        """Store it."""
        os.pwrite(self._fd, digest, where // BLOCK * _DIGEST)

    def windows(self) -> Iterator[int]:
        """The numbers of the windows that have any digest, ascending."""
        return windows_of_data(self._fd, 0, self._length, PAGE)

    def sha256(self) -> str:
        """The sha256 of the whole table, holes included: as that of digests.bin in a snapshot."""
        return sha256_of(self._fd, self._length)


def place_of(where: int) -> int:
    """Where the digest of the block at an offset begins in the piece of its window."""
    return where % WINDOW // BLOCK * _DIGEST

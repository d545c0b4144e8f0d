"""The stream: what was sent arrives, and what is damaged, cut, exchanged or of a later version does not."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.snapshots.pages import BLOCK, PAGE
from gmemd.snapshots.receiving import Receiving
from gmemd.snapshots.stream import Cut, Frame, Receiver, Sender, check_head
from tests.snapshots.engine import Engine

HEAD = {"format": "gmemd-stream", "version": 1, "purpose": "copy", "object": {
    "id": "m", "qom-type": "memory-backend-memfd", "size": 5 * BLOCK + 2 * PAGE, "properties": {}}}
SIZE = 5 * BLOCK + 2 * PAGE
HEADER = 40
PAGES = {0: b"a", 1: b"b", 17: b"c", 40: b"d", 81: b"e"}  # the last one is in the short block


@contextmanager
def memory(size: int = SIZE) -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


def stream_of(fd: int, size: int = SIZE, *, then: Callable[[], object] = lambda: None, rounds: int = 1) -> bytes:
    """What a worker sends of an object; `then` is called between the rounds and the last one."""
    with memory(0) as out:
        spec = {"parts": [[fd, 0, size]], "out": out, "in": -1, "state": -1, "head": HEAD, "rounds": rounds,
                "downtime": 0}
        engine = Engine("stream-send", spec, [fd, out])
        engine.heard("ready")
        then()
        engine.tell({"pass": {}})
        engine.heard("passed")
        engine.tell({"finish": {"consistency": {"consistent": True}}})
        engine.heard("end")
        engine.end()
        return os.pread(out, 1 << 30, 0)


@pytest.fixture(scope="module")
def stream() -> bytes:
    """One of a few pages, in which a page changes and one goes away after the first round."""
    with memory() as fd:
        for number, byte in PAGES.items():
            os.pwrite(fd, byte * PAGE, number * PAGE)

        def change() -> None:
            os.pwrite(fd, b"B" * PAGE, 1 * PAGE)
            os.pwrite(fd, bytes(PAGE), 40 * PAGE)

        return stream_of(fd, then=change)


def wanted() -> bytes:
    content = bytearray(SIZE)
    for number, byte in (PAGES | {1: b"B", 40: b"\0"}).items():
        content[number * PAGE:(number + 1) * PAGE] = byte * PAGE
    return bytes(content)


def received(data: bytes, size: int = SIZE) -> tuple[bytes, int]:
    """The memory that a stream makes, and its bytes that exist; QmpError."""
    with memory(0) as source, memory(size) as fd:
        os.pwrite(source, data, 0)
        os.lseek(source, 0, os.SEEK_SET)
        head = Receiver(source)
        check_head(head.frame())
        for _ in Receiving({"in": source, "out": -1, "state": -1, "check": head.check, "parts": [[fd, 0, size]]}).run():
            pass
        return os.pread(fd, size, 0), os.fstat(fd).st_blocks * 512


def frames(data: bytes) -> list[bytes]:
    """The frames of a stream."""
    found = []
    with memory(0) as source:
        os.pwrite(source, data, 0)
        os.lseek(source, 0, os.SEEK_SET)
        receiver, at = Receiver(source), 0
        while at < len(data):
            frame = receiver.frame()
            length = HEADER + len(frame.payload)
            found.append(data[at:at + length])
            at += length
    return found


def test_what_is_sent_arrives(stream: bytes) -> None:
    """Byte for byte; pages of zeros do not exist afterwards, not even one that was sent before."""
    content, present = received(stream)
    assert content == wanted()
    assert present == 4 * PAGE
    assert len(stream) < 10 * PAGE + 4096


def test_every_flipped_bit_is_found(stream: bytes) -> None:
    """In each header and JSON, and at random in the pages."""
    chosen = random.Random(1)
    places, at = set(), 0
    for frame in frames(stream):
        places |= {at + place for place in range(min(len(frame), HEADER))}
        places |= {at + chosen.randrange(len(frame)) for _ in range(20)}
        at += len(frame)
    for place in sorted(places):
        damaged = bytearray(stream)
        damaged[place] ^= 1 << chosen.randrange(8)
        with pytest.raises(QmpError):
            received(bytes(damaged))


def test_every_end_but_the_last_is_early(stream: bytes) -> None:
    """A stream that is cut anywhere is not taken for one that is whole."""
    ends, at = set(), 0
    for frame in frames(stream):
        ends |= {at, at + 1, at + HEADER - 1, at + HEADER, at + len(frame) - 1}
        at += len(frame)
    for end in sorted(ends - {len(stream)}):
        with pytest.raises(Cut):
            received(stream[:end])


def test_frames_stay_where_they_are(stream: bytes) -> None:
    """A frame that is lost, repeated or exchanged with another is noticed."""
    parts = frames(stream)
    for number in range(len(parts) - 1):
        for other in (parts[:number] + parts[number + 1:], parts[:number + 1] + parts[number:],
                      [*parts[:number], parts[number + 1], parts[number], *parts[number + 2:]]):
            with pytest.raises(QmpError):
                received(b"".join(other))


def made(*build: Callable[[Sender], object]) -> bytes:
    """A stream of frames that a sender of ours would not send."""
    with memory(0) as out:
        sender = Sender(out)
        for one in build:
            one(sender)
        return os.pread(out, 1 << 20, 0)


@pytest.mark.parametrize(("build", "words"), [
    ([lambda s: s.say("HEAD", {**HEAD, "version": 2})], "the stream is of version 2, and this gmemd knows 1"),
    ([lambda s: s.say("HEAD", {**HEAD, "version": "1"})], "the stream is of version 1"),
    ([lambda s: s.say("HEAD", {**HEAD, "format": "other"})], "this is not a stream of gmemd"),
    ([lambda s: s.say("ENDS", {})], "this is not a stream of gmemd"),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.say("HEAD", HEAD)], "the stream has HEAD where DATA or STAT or ENDS"),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.say("NEWS", {})], "a frame that this version does not know: b'NEWS'"),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.say("FAIL", {"desc": "no room"})], "the other side gives up: no room"),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.say("ENDS", {"digests": ["0"]})], "is not what was sent"),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.block(3, 0, bytes(16), 0, [])], "it has no part 3"),
    *(([lambda s: s.say("HEAD", HEAD),
        lambda s, at=at, pages=pages: s.block(0, at, bytes(16), pages, [memoryview(bytes(pages.bit_count() * PAGE))])],
       f"it has a block at {at}") for at, pages in ((1, 0), (SIZE // BLOCK * BLOCK + BLOCK, 0), (1 << 63, 0),
                                                   (SIZE // BLOCK * BLOCK, 4))),
    ([lambda s: s.say("HEAD", HEAD), lambda s: s.block(0, 0, bytes(16), 1, [memoryview(b"x" * PAGE)])],
     "the digest of the block at 0 is wrong"),
])
def test_what_is_wrong_is_said(build: list[Callable[[Sender], object]], words: str) -> None:
    with pytest.raises(QmpError, match=words.replace("(", r"\(")):
        received(made(*build))


@pytest.mark.parametrize("data", [b"", b"x", b"gmemd" * 100, bytes(1000), b"\xff" * 1000])
def test_something_else_is_no_stream(data: bytes) -> None:
    with pytest.raises(QmpError, match="not a stream of gmemd" if len(data) >= HEADER else "ends early"):
        received(data)


@pytest.mark.parametrize(("more", "words"), [
    ({"object": 5}, "object"), ({"object": {"id": "m"}}, "qom-type"), ({"bytes": "x"}, "bytes"),
    ({"parts": 9}, "parts"),
    ({"purpose": "move"}, "id"), ({"purpose": "move", "id": "x", "generation": "1"}, "generation"),
    ({"purpose": ["copy"]}, "purpose"), ({"purpose": "resolve", "id": "x"}, "state"),
])
def test_a_head_that_says_nonsense(more: dict[str, Any], words: str) -> None:
    """It is refused before anybody works with it."""
    with pytest.raises(QmpError, match=f"its HEAD has no valid '{words}'"):
        check_head(Frame("HEAD", 0, 0, 0, b"", bytearray(json.dumps({**HEAD, **more}).encode())))


def test_json_that_is_too_deep() -> None:
    with pytest.raises(QmpError, match="HEAD is not JSON"):
        check_head(Frame("HEAD", 0, 0, 0, b"", bytearray(b"[" * 50000)))


def test_a_huge_length_is_not_believed() -> None:
    """Nothing is allocated because a header says so."""
    from struct import pack

    from xxhash import xxh3_64_intdigest

    header = pack(">4sHHQ16s", b"HEAD", 0, 0, 1 << 62, bytes(16))
    with pytest.raises(QmpError, match="HEAD of 4611686018427387904 bytes"):
        received(header + pack(">Q", xxh3_64_intdigest(bytes(8) + header)))


def test_a_reader_takes_no_byte_too_many(stream: bytes) -> None:
    """Who reads HEAD leaves the rest for another process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(stream[:2000])
        check_head(Receiver(theirs.fileno()).frame())
        assert theirs.recv(4) == b"DATA"


def test_descriptors_that_do_not_block_are_waited_for() -> None:
    """ssh and others make what they share with us non-blocking."""
    import threading

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        found: list[Frame] = []

        def receive() -> None:
            receiver = Receiver(theirs.fileno())
            found.extend(receiver.frame() for _ in range(60))

        reader = threading.Thread(target=receive)
        reader.start()
        sender = Sender(ours.fileno())
        for number in range(60):
            sender.state(bytes([number]) * 100_000)
        reader.join(60)
        assert [frame.payload[0] for frame in found] == list(range(60))


def test_who_stops_reading_is_noticed() -> None:
    """A copy through a pipe whose reader has ended; not as if the daemon had."""
    reader, writer = os.pipe()
    os.close(reader)
    with memory() as fd:
        engine = Engine("stream-send", {"parts": [[fd, 0, SIZE]], "out": writer, "in": -1, "state": -1, "head": HEAD,
                                        "rounds": 1, "downtime": 0}, [fd, writer])
        os.close(writer)
        with pytest.raises(QmpError, match="nobody reads the stream any more"):
            engine.heard("ready")
        engine.end()


def test_sparse_memory_stays_sparse() -> None:
    """An object of 128 GiB with two pages in it is sent as two pages, and nothing is allocated on either side."""
    size = 128 << 30
    with memory(size) as fd:
        os.pwrite(fd, b"x" * PAGE, 1 << 30)
        os.pwrite(fd, b"y" * PAGE, size - PAGE)
        before = os.fstat(fd).st_blocks
        data = stream_of(fd, size, rounds=2)
        assert os.fstat(fd).st_blocks == before
    assert len(data) < 4 * PAGE
    with memory(0) as source, memory(size) as copy:
        os.pwrite(source, data, 0)
        os.lseek(source, 0, os.SEEK_SET)
        head = Receiver(source)
        head.frame()
        spec: dict[str, Any] = {"in": source, "out": -1, "state": -1, "check": head.check, "parts": [[copy, 0, size]]}
        for _ in Receiving(spec).run():
            pass
        assert os.fstat(copy).st_blocks * 512 == 2 * PAGE
        assert os.pread(copy, PAGE, size - PAGE) == b"y" * PAGE

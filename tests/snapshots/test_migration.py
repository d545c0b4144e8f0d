"""QEMU's migration stream is divided into the pages of a block and a stream without them."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Generator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gmemd.snapshots.migration import NotUnderstood, divide
from tests.guests.firmware import SIZE
from tests.guests.linux import needs_qemu
from tests.snapshots.engine import Engine
from tests.vmm.test_qemu import World

PAGE = 4096
ZERO, SIZES, DATA, END, SAME = 0x02, 0x04, 0x08, 0x10, 0x20
IDENTITY = struct.pack(">I", 2)
HEAD = b"QEVM" + struct.pack(">I", 3) + b"\x07\0\0\0\x0dpc-i440fx-7.2"
FOOTER = b"\x7e" + IDENTITY
DEVICES = b"\x04" + b"the state of the devices" * 1000


def word(offset: int, flags: int) -> bytes:
    return struct.pack(">Q", offset | flags)


def named(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def start(**sizes: int) -> bytes:
    """The section that lists the blocks."""
    blocks = b"".join(named(name) + struct.pack(">Q", size) for name, size in sizes.items())
    return (b"\x01" + IDENTITY + b"\x03ram" + struct.pack(">II", 0, 4) + word(sum(sizes.values()), SIZES) + blocks
            + word(0, END) + FOOTER)


def part(*records: bytes, last: bool = False) -> bytes:
    return (b"\x03" if last else b"\x02") + IDENTITY + b"".join(records) + word(0, END) + FOOTER


def page(offset: int, letter: bytes, name: str = "") -> bytes:
    """A page full of a letter; without a name it is of the same block as the one before."""
    return word(offset, DATA | (0 if name else SAME)) + (named(name) if name else b"") + letter * PAGE


def zero(offset: int, name: str = "", fill: bytes = b"\0") -> bytes:
    return word(offset, ZERO | (0 if name else SAME)) + (named(name) if name else b"") + fill


class Memory:
    """A block of four pages that begin as question marks."""

    def __init__(self) -> None:
        self.data = bytearray(b"?" * (4 * PAGE))

    def put(self, offset: int, pages: list[memoryview]) -> None:
        for number, page in enumerate(pages):
            assert len(page) == PAGE
            self.data[offset + number * PAGE:offset + (number + 1) * PAGE] = page

    def clear(self, offset: int, count: int) -> None:
        self.data[offset:offset + count * PAGE] = bytes(count * PAGE)

    @property
    def letters(self) -> str:
        assert all(len(set(self.data[at:at + PAGE])) == 1 for at in range(0, len(self.data), PAGE))
        return self.data[::PAGE].decode()


@pytest.fixture
def memory() -> Memory:
    return Memory()


def divided(stream: bytes, memory: Memory, *, pieces: int = 1 << 20) -> bytes:
    """Let a pipe bring a stream, so many bytes at a time; what is left of it."""
    rest = bytearray()
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb", 0) as pipe, suppress(BrokenPipeError):
            for at in range(0, len(stream), pieces):
                pipe.write(stream[at:at + pieces])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert returned(divide(reader, ["/objects/ram", "ram"], memory, rest.extend)) == 4 * PAGE
    finally:
        os.close(reader)
        thread.join()
    return bytes(rest)


def returned(counts: Generator[int, None, int]) -> int:
    """What a generator returns."""
    while True:
        try:
            next(counts)
        except StopIteration as ended:
            return int(ended.value)


STREAM = (HEAD, start(bios=2 * PAGE, ram=4 * PAGE),
          part(page(0, b"B", "bios"), page(0, b"a", "ram"), page(PAGE, b"b"), zero(3 * PAGE)),
          b"\x08" + struct.pack(">HH", 4, 3) + b"abc",
          part(page(0, b"A"), zero(PAGE), zero(PAGE, "bios"), page(0, b"C")),
          part(zero(PAGE, "ram"), zero(2 * PAGE), zero(3 * PAGE), page(2 * PAGE, b"d"), page(3 * PAGE, b"e"),
               zero(3 * PAGE)),
          part(page(PAGE, b"D", "bios"), page(2 * PAGE, b"c", "ram"), last=True), DEVICES)
REST = (HEAD, start(bios=2 * PAGE, ram=4 * PAGE), part(page(0, b"B", "bios")), STREAM[3],
        part(zero(PAGE, "bios"), page(0, b"C")), part(), part(page(PAGE, b"D", "bios"), last=True), DEVICES)


@pytest.mark.parametrize("pieces", [1 << 20, 4097, 7])
def test_a_stream_is_divided(memory: Memory, pieces: int) -> None:
    """Of a page that comes again the last one counts; other blocks and everything else stay in the stream."""
    assert divided(b"".join(STREAM), memory, pieces=pieces) == b"".join(REST)
    assert memory.letters == "A\0c\0"


@pytest.mark.parametrize(("stream", "words"), [
    (b"", "ends early"),
    (b"RIFF" + b"".join(STREAM)[4:], "not a migration stream"),
    (HEAD, "ends early"),
    (HEAD + bytes(100000), "has no RAM"),
    (HEAD + start(bios=PAGE) + DEVICES, "no RAM block '/objects/ram'"),
    (b"".join(STREAM[:3]), "ends early"),
    (b"".join(STREAM[:7]), "before the state of the devices"),
    (b"".join(STREAM[:2]) + part(zero(0, "ram", b"x")), "repeated bytes"),
    (b"".join(STREAM[:2]) + part(page(4 * PAGE, b"x", "ram")), "behind the end"),
    (b"".join(STREAM[:2]) + part(word(0, 0x100) + bytes(PAGE)), "unknown form, 0x100"),
    (b"".join(STREAM[:2]) + part(page(0, b"x", "ram"))[:-1] + b"x", "does not end where it should"),
    (b"".join(STREAM[:3]) + b"\x01" + bytes(50), "more than RAM"),
])
def test_another_stream_is_refused(memory: Memory, stream: bytes, words: str) -> None:
    """What is not understood is not guessed at; the sentence says what it was."""
    with pytest.raises(NotUnderstood, match=words):
        divided(stream, memory)


def test_a_stream_that_ends_anywhere_is_refused(memory: Memory) -> None:
    """Only the end of the devices' state cannot be told from a cut: QEMU's own status tells."""
    stream = b"".join(STREAM)
    for end in [*range(0, len(HEAD) + 100, 3), *range(len(HEAD) + 100, len(stream) - len(DEVICES), 511)]:
        with pytest.raises(NotUnderstood):
            divided(stream[:end], memory)


@pytest.mark.e2e
@needs_qemu
def test_a_guest_goes_on_from_a_divided_stream(tmp_path: Path) -> None:
    """What a QEMU has sent while its guest ran, once divided, is that guest's memory and device state."""
    with ExitStack() as ends:
        first, second = World(tmp_path, ends), World(tmp_path, ends)
        source = first.start("first")
        first.guest.wait_runs()
        state = os.open(tmp_path / "state", os.O_RDWR | os.O_CREAT)
        ends.callback(os.close, state)
        reader, writer = os.pipe()
        engine = Engine("receive", {"stream": reader, "memory": second.fd, "state": state, "size": SIZE},
                        [reader, second.fd, state])
        ends.callback(engine.end)
        os.close(reader)
        engine.tell({"blocks": ["ram"]})
        source.begin_save(writer, whole=True)
        os.close(writer)
        assert engine.heard("end")["bytes"] == os.fstat(state).st_size < 1 << 20
        source.wait_migration()
        assert os.pread(first.fd, SIZE, 0) == os.pread(second.fd, SIZE, 0)
        counted = first.guest.count
        target = second.start("second", "-incoming", "defer")
        os.lseek(state, 0, os.SEEK_SET)
        target.load_state(state)
        target.cont()
        second.guest.wait_runs()
        assert second.guest.count != counted == first.guest.count

"""Pages as a mask, a byte for each: which hold anything, which differ, and the mask as the bits of map.bin.

Nothing here does any I/O. The units of the format: a page is 4 KiB whatever the machine's is, a block, which has a
digest, 64 KiB, a window, which has one 4 KiB piece of digests, 16 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Final

PAGE: Final = 4096
BLOCK: Final = 64 << 10
WINDOW: Final = 16 << 20
CHUNK: Final = 2 << 20  # bytes that are read, hashed and written at a time
BLOCKS: Final = WINDOW // BLOCK  # of a window
NOTHING: Final = bytes(16)  # the digest of a block of zeros

_ZERO_PAGE: Final = bytes(PAGE)
_SET: Final = re.compile(rb"\x01+")
_TO_DIGITS: Final = bytes.maketrans(b"\0\1", b"01")
_FROM_DIGITS: Final = bytes.maketrans(b"01", b"\0\1")


def filled(view: memoryview) -> bytearray:
    """The mask of the pages that are not all zeros. Most are known by their first word."""
    mask = bytearray(map(bool, view.cast("Q")[::PAGE // 8].tolist()))
    at = mask.find(0)
    while at >= 0:
        mask[at] = bytes(view[at * PAGE:(at + 1) * PAGE]) != _ZERO_PAGE
        at = mask.find(0, at + 1)
    return mask


def differing(view: memoryview, other: memoryview) -> bytearray:
    """The mask of the pages that are not equal."""
    return bytearray(bytes(view[at:at + PAGE]) != bytes(other[at:at + PAGE]) for at in range(0, len(view), PAGE))


def both(one: bytes | bytearray, other: bytes | bytearray) -> bytearray:
    """The mask of what both have."""
    return bytearray(a & b for a, b in zip(one, other, strict=True))


def without(one: bytes | bytearray, other: bytes | bytearray) -> bytearray:
    """The mask of what the first has and the other has not."""
    return bytearray(a & ~b for a, b in zip(one, other, strict=True))


def runs(mask: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of each run of pages in a mask."""
    for run in _SET.finditer(mask):
        yield run.start() * PAGE, len(run.group()) * PAGE


def pieces(length: int, blocks: set[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of what is read at a time of these blocks of a window of `length` bytes: rows, up to a chunk."""
    for _, group in groupby(enumerate(sorted(blocks)), lambda pair: (pair[1] - pair[0], pair[1] * BLOCK // CHUNK)):
        row = [block for _, block in group]
        yield row[0] * BLOCK, min((row[-1] + 1) * BLOCK, length)


def to_bits(mask: bytes | bytearray) -> bytes:
    """A bit for each page, the first one the lowest of the first byte."""
    return int(mask.translate(_TO_DIGITS)[::-1], 2).to_bytes((len(mask) + 7) // 8, "little")


def from_bits(bits: bytes | bytearray, count: int) -> bytearray:
    """The mask of `count` pages."""
    number = int.from_bytes(bits, "little") & (1 << count) - 1
    return bytearray(f"{number:0{count}b}"[::-1].encode().translate(_FROM_DIGITS))

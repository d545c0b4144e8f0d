"""map.bin and digests.bin of one part, a window at a time; both are sparse files, so 1 TiB of holes costs nothing."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from typing import Final

from gmemd.errors import close_fd
from gmemd.kernel.residency import data_ranges, next_data
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots.pages import BLOCK, BLOCKS, NOTHING, PAGE, WINDOW, from_bits, to_bits

_DIGEST: Final = 16  # bytes
_PIECE: Final = BLOCKS * _DIGEST  # bytes of digests.bin for a window
_MAP_PIECE: Final = WINDOW // PAGE // 8  # bytes of map.bin for a window
_ZEROS: Final = bytes(1 << 20)


class Tables:
    """The two tables of a part of `size` bytes; owns their descriptors."""

    def __init__(self, folder: int, map_name: str, digests_name: str, size: int, *, create: bool = False) -> None:
        self.size = size
        self.lengths = (-(-size // PAGE // 8), -(-size // BLOCK) * _DIGEST)  # bytes of each file
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL if create else os.O_RDONLY | os.O_NONBLOCK
        self.map = open_beneath(folder, map_name, flags, 0o600 if create else 0)
        try:
            self.digests = open_beneath(folder, digests_name, flags, 0o600 if create else 0)
        except OSError:
            close_fd(self.map)
            raise
        if create:
            os.ftruncate(self.map, self.lengths[0])
            os.ftruncate(self.digests, self.lengths[1])

    def close(self) -> None:
        close_fd(self.map)
        close_fd(self.digests)

    def read(self, window: int) -> tuple[bytearray, bytearray]:
        """The digests of a window's blocks, and the mask of its pages."""
        count = min(WINDOW, self.size - window * WINDOW)
        digests = bytearray(-(-count // BLOCK) * _DIGEST)
        bits = bytearray(-(-count // PAGE // 8))
        read_exactly(self.digests, memoryview(digests), window * _PIECE)
        read_exactly(self.map, memoryview(bits), window * _MAP_PIECE)
        return digests, from_bits(bits, count // PAGE)

    def write(self, window: int, digests: bytes | bytearray, mask: bytes | bytearray) -> None:
        """Replace them."""
        write_fully(self.digests, memoryview(digests), window * _PIECE)
        write_fully(self.map, memoryview(to_bits(mask)), window * _MAP_PIECE)

    def windows(self) -> Iterator[int]:
        """The windows with any block that is not zeros, as far as the file system knows; ascending."""
        return windows_of_data(self.digests, 0, self.lengths[1], _PIECE)

    def blocks(self, window: int) -> set[int]:
        """The blocks of a window that are not zeros."""
        digests = self.read(window)[0]
        return {number for number in range(len(digests) // _DIGEST)
                if digests[number * _DIGEST:(number + 1) * _DIGEST] != NOTHING}

    def copy(self, other: Tables, *, with_map: bool) -> None:
        """Take the contents of another part's tables of the same size, with the map or with digests only."""
        copy_data(other.digests, self.digests, self.lengths[1])
        if with_map:
            copy_data(other.map, self.map, self.lengths[0])

    def sync(self) -> None:
        """Make both durable."""
        os.fsync(self.map)
        os.fsync(self.digests)

    def hashes(self) -> dict[str, str]:
        """The members of the manifest that guard them."""
        return {"map-sha256": sha256_of(self.map, self.lengths[0]),
                "digests-sha256": sha256_of(self.digests, self.lengths[1])}


def windows_of_data(fd: int, offset: int, size: int, unit: int) -> Iterator[int]:
    """The numbers of the units of a range of a file in which there is any data, ascending."""
    at, end = offset, offset + size
    while (begin := next_data(fd, at, end)) < end:
        number = (begin - offset) // unit
        yield number
        at = offset + (number + 1) * unit


def blocks_of_data(fd: int, offset: int, size: int) -> tuple[set[int], tuple[int, int]]:
    """The numbers of the blocks of a range of a file, one window at most, in which there is any data.

    Also the last run of data, (begin, end) in the file, which may end far behind the range.
    """
    found: set[int] = set()
    run = (0, 0)
    at, end = offset, offset + size
    while (begin := next_data(fd, at, end)) < end:
        run = begin, os.lseek(fd, begin, os.SEEK_HOLE)
        last = (min(run[1], end) - 1 - offset) // BLOCK
        found.update(range((begin - offset) // BLOCK, last + 1))
        at = offset + (last + 1) * BLOCK
    return found, run


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fill a buffer from a file; ENODATA if it ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        done += count


def write_fully(fd: int, view: memoryview, offset: int) -> None:
    """Write all of a buffer."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def copy_data(source: int, target: int, size: int) -> None:
    """Copy what is not a hole to the same places of another file."""
    for begin, count in data_ranges(source, 0, size):
        for at in range(begin, begin + count, len(_ZEROS)):
            write_fully(target, memoryview(os.pread(source, min(len(_ZEROS), begin + count - at), at)), at)


def sha256_of(fd: int, size: int) -> str:
    """The hash of the first `size` bytes of a file; holes are not read. ENODATA if it ends before."""
    digest, done = hashlib.sha256(), 0
    for begin, count in [*data_ranges(fd, 0, size), (size, 0)]:
        while done < begin:
            zeros = min(len(_ZEROS), begin - done)
            digest.update(memoryview(_ZEROS)[:zeros])
            done += zeros
        while done < begin + count:
            part = os.pread(fd, min(len(_ZEROS), begin + count - done), done)
            if not part:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            digest.update(part)
            done += len(part)
    return digest.hexdigest()

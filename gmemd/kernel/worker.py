"""The worker process: called with a verb and one JSON object, it works on contents. program.py says how it starts.

The daemon never touches contents that others can truncate: a SIGBUS cannot be caught in Python. Here it ends only this
process. Absent pages are never read through a mapping, which would allocate them.

A verb is a generator in the VERBS of the module that does the work: it gets the object, yields messages, each a line of
JSON on the standard output, and returns what the last one, {"end": true, ...}, holds. A failure ends as {"errno": N} or
{"error": SENTENCE}. What the daemon tells it meanwhile it hears on its standard input.

hash and zero take {"fd": N, "offset": BYTES, "size": BYTES, "chunk": BYTES} and say for each chunk that has any content
{"done": BYTES}; when hashing, {"offset": N, "size": N, "digest": HEX} as well. The digest of a chunk is the XXH3 (128
bits, big-endian hex) of its bytes, with absent pages as zeros: anybody who maps the object gets the same. An
inaccessible page (private memory) counts as absent.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from gmemd.errors import QmpError
from gmemd.kernel import backing, residency, syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE

WINDOW = 16 << 20  # bytes that are mapped, read or written at a time

Ranges = list[tuple[int, int]]
Message = dict[str, int | str]
Verb = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]

_ZEROS = memoryview(bytes(1 << 20))


def hash_chunks(fd: int, offset: int, size: int, chunk: int) -> Iterator[Message]:
    """The digest of each chunk of a range of the file; offsets count from the start of the range."""
    from xxhash import xxh3_128

    for start, length, parts in _chunks(_present(fd, offset, size), offset, size, chunk):
        digest = xxh3_128()
        for at, count, exists in _filled(parts, offset + start, length):
            for part in _read(fd, at, count) if exists else _zeros(count):
                digest.update(part)
        yield {"offset": start, "size": length, "digest": digest.hexdigest(), "done": start + length}


def zero_chunks(fd: int, offset: int, size: int, chunk: int) -> Iterator[Message]:
    """Overwrite what exists of a range with zeros, then free its pages; pinned pages then hold zeros too."""
    for start, length, parts in _chunks(_present(fd, offset, size), offset, size, chunk):
        for at, count in parts:
            _wipe(fd, at, count)
        yield {"done": start + length}
    if backing.is_only_memory(fd):
        syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, offset, size)


def _chunks(present: Ranges, offset: int, size: int, chunk: int) -> Iterator[tuple[int, int, Ranges]]:
    """(start, bytes, what is present there) of each chunk that is not entirely absent; starts count from `offset`."""
    parts: Ranges = []
    start = 0
    for at, count in present:
        while count:
            begin = (at - offset) // chunk * chunk
            if begin != start and parts:
                yield start, min(chunk, size - start), parts
                parts = []
            start = begin
            piece = min(count, offset + begin + chunk - at)
            parts.append((at, piece))
            at, count = at + piece, count - piece
    if parts:
        yield start, min(chunk, size - start), parts


def _present(fd: int, offset: int, size: int) -> Ranges:
    """[(offset, bytes)] of what has any content in a range, including swapped pages, ascending."""
    if backing.page_size(fd) != PAGE_SIZE:
        return _not_zero(fd, offset, size)
    return residency.data_ranges(fd, offset, size)


def _not_zero(fd: int, offset: int, size: int) -> Ranges:
    """The huge pages of a range that hold anything: reading a hole of a hugetlb file allocates nothing."""
    page = backing.page_size(fd)
    return [(at, page) for at in range(offset, offset + size, page)
            if any(bytes(part).strip(b"\0") for part in _by_read(fd, at, page))]


def _filled(present: Ranges, offset: int, size: int) -> Iterator[tuple[int, int, bool]]:
    """The whole range piece by piece: (offset, bytes, whether it is present)."""
    for at, count in present:
        if at > offset:
            yield offset, at - offset, False
        yield at, count, True
        size -= at + count - offset
        offset = at + count
    if size:
        yield offset, size, False


def _zeros(count: int) -> Iterator[memoryview]:
    while count:
        part = min(count, len(_ZEROS))
        yield _ZEROS[:part]
        count -= part


def _read(fd: int, offset: int, size: int) -> Iterator[memoryview]:
    """The bytes of a range: by read(2), which neither holes nor shrinking affect, or else by mapping it."""
    try:
        os.pread(fd, 1, offset)
    except OSError as exc:
        if exc.errno not in (errno.ESPIPE, errno.EINVAL):
            raise
        return _by_mapping(fd, offset, size)
    return _by_read(fd, offset, size)


def _by_read(fd: int, offset: int, size: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(size, 1 << 20)))
    end = offset + size
    while offset < end:
        count = os.preadv(fd, [buffer[:min(len(buffer), end - offset)]], offset)
        if not count:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        yield buffer[:count]
        offset += count


def _by_mapping(fd: int, offset: int, size: int) -> Iterator[memoryview]:
    for at in range(offset, offset + size, WINDOW):
        count = min(WINDOW, offset + size - at)
        with mmap.mmap(fd, count, prot=mmap.PROT_READ, offset=at) as window, memoryview(window) as view:
            if _touchable(window):
                yield view
            else:  # some of it is private: page by page
                for page in range(0, count, PAGE_SIZE):
                    yield view[page:page + PAGE_SIZE] if _touchable(window, page, PAGE_SIZE) else _ZEROS[:PAGE_SIZE]


def _touchable(window: mmap.mmap, *part: int) -> bool:
    """Whether all of a window, or of a part of it (offset, bytes), may be touched."""
    try:
        window.madvise(uapi.MADV_POPULATE_READ, *part)
    except OSError as exc:
        if exc.errno != errno.EFAULT:
            raise
        return False
    return True


def _wipe(fd: int, offset: int, size: int) -> None:
    for at in range(offset, offset + size, WINDOW):
        count = min(WINDOW, offset + size - at)
        with mmap.mmap(fd, count, offset=at) as window:
            if _touchable(window):
                window[:] = bytes(count)
                continue
            for page in range(0, count, PAGE_SIZE):
                if _touchable(window, page, PAGE_SIZE):
                    window[page:page + PAGE_SIZE] = bytes(PAGE_SIZE)


def heard() -> dict[str, Any] | None:
    """Wait for what the daemon tells next; None: it has ended, or has nothing more to tell."""
    line = sys.stdin.buffer.readline()
    told: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
    return told


VERBS: dict[str, Verb] = {"hash": lambda spec: hash_chunks(**spec), "zero": lambda spec: zero_chunks(**spec)}


def main(verb: Verb, spec: str) -> int:
    """Do the work and report the outcome; the exit status is 0 if it could be reported."""
    work = verb(json.loads(spec))
    try:
        while True:
            print(json.dumps(next(work)), flush=True)
    except StopIteration as ended:
        outcome = {"end": True, **(ended.value or {})}
    except BrokenPipeError:  # the daemon has ended; the work is given up, and removes what it has begun
        del work
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tells of what it could not
        return 1
    except OSError as exc:
        outcome = {"errno": exc.errno or errno.EIO}
    except QmpError as exc:
        outcome = {"error": exc.desc}
    print(json.dumps(outcome), flush=True)
    return 0

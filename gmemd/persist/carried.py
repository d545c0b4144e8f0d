"""The registry's copy: a sealed memfd in the fd store, for where the store outlives the registry's directory.

A live update (kexec) carries the memfds of systemd's store into the next boot, but not /run. So a copy of the registry
travels as one of them. It is written when the daemon stops and after each quiet moment; while the daemon runs, the file
is the registry. At start the file is used if it is whole, unless it is older than the copy.

A copy may lack what was done last. So the registry restored from it gets a new generation: an fd that it does not know
is unclaimed, not dropped as never acknowledged.

Form: a line with sizes and a CRC-32, then JSON (what the file says about itself, and each stored memfd's seals), then
the SQLite file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Mapping
from typing import NamedTuple
from zlib import crc32

from gmemd.persist.reason import reason
from gmemd.persist.record import COLUMNS, Damaged, Record, State, record_of, state_of, state_row
from gmemd.persist.salvage import new_file, put_in_place
from gmemd.persist.tables import GET_STATE, PUT_STATE, check
from gmemd.posix.private import make_private

PREFIX = "registry-"  # of the copies' names in the store; a number follows, the newest has the highest
ROOM = 2  # entries of the store that are reserved for it: a new copy is stored before the old one leaves

_MAGIC = b"gmemd-registry-1"
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ALL = f"SELECT {COLUMNS} FROM objects ORDER BY seq, id"

_LAST_SEQ = "SELECT coalesce(max(seq), 0) FROM objects"


class Copy(NamedTuple):
    """A whole copy."""

    boot: str  # in which it was written
    generation: str
    age: tuple[int, int, int]  # starts, last_seq, commits: none of them ever decreases
    seals: Mapping[str, int]  # of the stored memfds, by name
    image: bytes  # the SQLite file

    def records(self) -> list[Record]:
        """What it holds, oldest first; a damaged row is left out."""
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            db.deserialize(self.image)
            return [record for row in db.execute(_ALL).fetchall() for record in _sound(row)]


def is_copy(name: str) -> bool:
    """Whether this is the name of a copy in the store."""
    return name.startswith(PREFIX) and number_of(name) > 0


def number_of(name: str) -> int:
    """The number in a copy's name; 0: it is not one."""
    prefix, _, number = name.rpartition("-")
    return int(number) if f"{prefix}-" == PREFIX and number.isdecimal() else 0


def age_of(state: State) -> tuple[int, int, int]:
    """What tells an older registry from a newer one of the same generation."""
    return state.starts, state.last_seq, state.commits


def written(state: State, image: bytes, boot: str, seals: Mapping[str, int]) -> bytes:
    """A copy's bytes."""
    about = json.dumps({"boot": boot, "generation": state.generation, "age": age_of(state), "seals": seals}).encode()
    body = about + image
    return b"%s %d %d %08x\n%s" % (_MAGIC, len(about), len(image), crc32(body), body)


def sealed(data: bytes) -> int:
    """A memfd with these bytes, which nobody can change; the caller owns the fd. OSError."""
    fd = os.memfd_create("gmemd-registry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left):]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(fd: int) -> Copy | None:
    """The copy in a sealed memfd; None: it is not whole."""
    try:
        return parsed(_all(fd)) if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS else None
    except (OSError, MemoryError):
        return None


def parsed(data: bytes) -> Copy | None:
    """The copy with these bytes; None: it is not whole."""
    try:
        head, _, body = data.partition(b"\n")
        magic, about_size, image_size, checksum = head.split()
        size = int(about_size)
        if magic != _MAGIC or len(body) != size + int(image_size) or crc32(body) != int(checksum, 16):
            return None
        about = json.loads(body[:size])
        starts, last_seq, commits = about["age"]
        return Copy(about["boot"], about["generation"], (starts, last_seq, commits), about["seals"], body[size:])
    except (ValueError, KeyError, TypeError):
        return None


def newest(fds: Iterable[tuple[str, int]]) -> Copy | None:
    """The newest whole copy among what the service manager passed; None: there is none."""
    copies = sorted((number_of(name), fd) for name, fd in fds if is_copy(name))
    return next((copy for _, fd in reversed(copies) if (copy := read(fd)) is not None), None)


def put_back(copy: Copy | None, path: str) -> str:
    """Make the copy the registry at `path` if there is none or an older one; what was done, "" for nothing."""
    if copy is None:
        return ""
    there = os.path.lexists(path)
    if there and not _is_older(path, copy):
        return ""
    try:
        new = new_file(path)
        make_private(new)
        with open(new, "wb") as file:
            file.write(copy.image)
        _renew(new)
        if there:
            aside = put_in_place(new, path)
            return f"registry '{path}' is older than a copy, which is used; it is now '{aside}'"
        os.replace(new, path)
    except (OSError, sqlite3.Error) as exc:
        why = reason(exc) if isinstance(exc, sqlite3.Error) else os.strerror(exc.errno or 0)
        return f"registry '{path}' cannot be restored from a copy: {why}"
    return f"registry '{path}' did not exist and was restored from a copy"


def _renew(path: str) -> None:
    """Give a restored registry a new generation. sqlite3.Error."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        state = state_of(db.execute(GET_STATE).fetchone())
        db.execute(PUT_STATE, state_row(state._replace(generation=os.urandom(4).hex())))


def _is_older(path: str, copy: Copy) -> bool:
    """Whether the file is whole and was written before the copy; what is not whole is left to the registry."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as db:
            state = check(db, path, 1 << 30)
            last_seq = int(db.execute(_LAST_SEQ).fetchone()[0]) if state.version else 0
    except (sqlite3.Error, UnicodeDecodeError, Damaged):
        return False
    age = age_of(state._replace(last_seq=max(state.last_seq, last_seq)))
    if state.generation != copy.generation:  # made by a gmemd that knows no copies, if nothing was ever kept in it
        return age[1:] == (0, 0)
    return any(there < here for there, here in zip(age, copy.age, strict=True))


def _sound(row: tuple[object, ...]) -> Iterable[Record]:
    with contextlib.suppress(Damaged):
        yield record_of(row)


def _all(fd: int) -> bytes:
    """The bytes of a file; os.pread returns at most 2 GiB at once."""
    parts, offset = [], 0
    while part := os.pread(fd, 1 << 30, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)

"""What is recorded about an object and about the registry itself, and the rows made of it.

SQLite has no checksums of its own: each row has one, so that a flipped bit is detected.
"""

from __future__ import annotations

import json
import json.encoder
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from zlib import crc32

Row = tuple[Any, ...]  # of str and int; the last member is the checksum

COLUMNS = (
    "id, seq, qom_type, arguments, kind, size, kernel, owner_uid, owner_pid, created, origin, extra, "
    "fd_name, file, checksum"
)  # of table objects; origin is the boot

_FORMATS = tuple("%s\x1f" * count for count in range(16))  # of a row without its checksum, for that
_BOOT = 32  # characters of a boot's id; earlier gmemds wrote something shorter in its place


@dataclass(slots=True)
class Record:
    """What is recorded about one object. Custody fills in the second group, a start the third."""

    id: str
    qom_type: str
    arguments: dict[str, Any]  # of object-add, completed; JSON
    kind: str  # "memfd" | "hugetlb-memfd" | "guest-memfd" | "file" | ..., as named by Kernel.identify
    size: int  # bytes
    kernel: str = ""  # name of the Kernel that created it
    owner_uid: int = -1
    owner_pid: int = -1
    created: int = 0  # seconds since 1970, by the clock then
    extra: dict[str, Any] = field(default_factory=dict)  # JSON, for what later versions add

    seq: int = 0  # order of creation, unique in a registry
    fd_name: str = ""  # in the fd store; "": the object has no fd
    st_dev: int = 0
    st_ino: int = 0
    st_size: int = 0  # bytes, when it was stored
    boot: str = ""  # the boot whose st_dev and st_ino these are; "": not recorded

    carried: bool = field(default=False, compare=False)  # its memory has come from another boot; not written
    missing: str = field(default="", compare=False)  # why its memory did not come back; not written

    def changed(self, **members: Any) -> Record:
        """A copy with other members."""
        return replace(self, **members)


class State(NamedTuple):
    """What the registry knows about itself."""

    version: int  # of the schema, as in PRAGMA user_version
    generation: str  # new for each registry, part of every fd's name
    last_seq: int  # the highest sequence number ever acknowledged
    commits: int  # transactions with removals
    starts: int  # how many times it was opened
    removing: tuple[str, ...]  # names whose removal from the fd store is decided, but not confirmed


class Damaged(Exception):
    """The file is not what the registry wrote; str() says in what way."""


def _parts_of_json() -> Callable[[Any, int], Iterable[str]]:
    """What gives a value's JSON in parts, at this indentation: the C encoder, which json makes once for each value."""
    encoder = json.JSONEncoder(separators=(",", ":"))
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, indent: encoder.iterencode(value)
    parts: Callable[[Any, int], Iterable[str]] = make(
        None, encoder.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return parts


_parts = _parts_of_json()


def _to_json(value: dict[str, Any]) -> str:
    return "".join(_parts(value, 0))


def row_of(record: Record) -> Row:
    """The row of table objects; raises TypeError or ValueError for what cannot be written."""
    row = (
        record.id,
        record.seq,
        record.qom_type,
        _to_json(record.arguments),
        record.kind,
        str(record.size),
        record.kernel,
        record.owner_uid,
        record.owner_pid,
        record.created,
        record.boot,
        _to_json(record.extra) if record.extra else "{}",
        record.fd_name,
        f"{record.st_dev} {record.st_ino} {record.st_size}",
    )
    return (*row, _checksum(row))


def record_of(row: Row) -> Record:
    """The record of a row; raises Damaged."""
    if _checksum(row[:-1]) != row[-1]:
        raise Damaged(f"the checksum of object {row[0]!r} is wrong")
    id_, seq, qom_type, arguments, kind, size, kernel, uid, pid, created, boot, extra, fd_name, file = row[:14]
    try:
        dev, ino, st_size = map(int, file.split())
        return Record(id_, qom_type, json.loads(arguments), kind, int(size), kernel, uid, pid, created,
                      json.loads(extra), seq, fd_name, dev, ino, st_size, boot if len(boot) == _BOOT else "")
    except (ValueError, TypeError, AttributeError) as exc:
        raise Damaged(f"the row of object {id_!r} is not a record") from exc


def state_row(state: State) -> Row:
    """The one row of table state."""
    row = (*state[:5], " ".join(state.removing))
    return (*row, _checksum(row))


def state_of(row: Row | None) -> State:
    """The state in its row; raises Damaged."""
    if row is None or _checksum(row[:-1]) != row[-1]:
        raise Damaged("the checksum of its state is wrong")
    version, generation, last_seq, commits, starts, removing, _ = row
    return State(version, generation, last_seq, commits, starts, tuple(removing.split()))


def _checksum(row: Row) -> int:
    return crc32((_FORMATS[len(row)] % row).encode())

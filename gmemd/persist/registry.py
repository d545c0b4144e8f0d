"""Record durably what each object is: one SQLite file beside the socket, living as long as the fds.

Durability. The file is in a runtime directory: the machine's death takes it together with the memory it
describes, so what counts is the death of a process, which leaves written bytes in the page cache. Hence no
fsync (synchronous=OFF). A rollback journal in exclusive locking mode, measured on tmpfs: 18 us a
transaction of one row, 5 us a row by 64; WAL costs 25 us and 5 us, and a truncated WAL silently takes
commits back, where a truncated database is noticed. The exclusive lock also keeps a second daemon out.

Truth. SQLite has no checksums of its own: each row carries one, so that a flipped bit is found and never
believed. A transaction either advances `commits` or did not happen; after an error `reopen` tells which.

Versions. PRAGMA user_version is the schema's version, repeated in the state row (a flipped bit in one is
damage, not a newer version). MIGRATIONS[n] makes version n + 1 from version n. A newer file is refused and
not changed.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from gmemd.errors import QmpError

Migration = Callable[[sqlite3.Connection], None]
Row = tuple[Any, ...]


@dataclass(slots=True)
class Record:
    """What is written about one object. The second group is filled in by Custody."""

    id: str
    qom_type: str
    arguments: dict[str, Any]  # of object-add, completed; JSON
    kind: str  # "memfd" | "hugetlb-memfd" | "guest-memfd" | "file" | ..., as Kernel.identify names it
    size: int  # bytes
    kernel: str = ""  # name of the Kernel that made it
    owner_uid: int = -1
    owner_pid: int = -1
    created: int = 0  # seconds since 1970
    origin: str = ""
    extra: dict[str, Any] = field(default_factory=dict)  # JSON, for what later versions add

    seq: int = 0  # order of creation, unique in a registry
    fd_name: str = ""  # in the fd store; "": the object has no fd
    st_dev: int = 0
    st_ino: int = 0
    st_size: int = 0  # bytes, when stored


@dataclass(frozen=True, slots=True)
class State:
    """The one row that moves with every transaction."""

    version: int
    generation: str  # made anew with each registry, part of every fd's name
    last_seq: int  # the highest sequence number that was ever acknowledged
    commits: int
    removing: tuple[str, ...]  # names whose removal from the fd store is decided, not yet known to be done


class RegistryTooNew(QmpError):
    """A newer gmemd wrote this file."""


class Damaged(Exception):
    """The file is not what this module wrote; str() says how that shows."""


def _create(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL,"
        " generation TEXT NOT NULL, last_seq INTEGER NOT NULL, commits INTEGER NOT NULL,"
        " removing TEXT NOT NULL, checksum INTEGER NOT NULL)"
    )
    db.execute(
        "CREATE TABLE objects (id TEXT PRIMARY KEY, seq INTEGER NOT NULL, qom_type TEXT NOT NULL,"
        " arguments TEXT NOT NULL, kind TEXT NOT NULL, size TEXT NOT NULL, kernel TEXT NOT NULL,"
        " owner_uid INTEGER NOT NULL, owner_pid INTEGER NOT NULL, created INTEGER NOT NULL,"
        " origin TEXT NOT NULL, extra TEXT NOT NULL, fd_name TEXT NOT NULL, file TEXT NOT NULL,"
        " checksum INTEGER NOT NULL) WITHOUT ROWID"
    )


MIGRATIONS: tuple[Migration, ...] = (_create,)
APPLICATION_ID = 0x676D656D  # "gmem", in the header of the file

_COLUMNS = (
    "id, seq, qom_type, arguments, kind, size, kernel, owner_uid, owner_pid, created, origin, extra, "
    "fd_name, file"
)
_PUT = f"INSERT OR REPLACE INTO objects ({_COLUMNS}, checksum) VALUES ({', '.join('?' * 15)})"
_GET = f"SELECT {_COLUMNS}, checksum FROM objects ORDER BY seq, id"
_DELETE = "DELETE FROM objects WHERE id = ?"
_PUT_STATE = (
    "UPDATE state SET version = ?, generation = ?, last_seq = ?, commits = ?, removing = ?, checksum = ?"
)
_GET_STATE = "SELECT version, generation, last_seq, commits, removing, checksum FROM state"

_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_CORRUPTFS", "SQLITE_IOERR_SHORT_READ")


class Registry:
    """An open registry. One connection, one process, one thread at a time."""

    def __init__(self, path: str, *, migrations: Sequence[Migration] = MIGRATIONS) -> None:
        """Open or create the file; migrate it forward.

        A damaged file is moved aside and `damage` says so in words; `salvaged` are the rows that were
        sound. A file that cannot be written leaves `read_only` with the reason. Raises RegistryTooNew, or
        QmpError when another process has it open or it cannot even be read.
        """
        self.path = path
        self.read_only = ""
        self.damage = ""
        self.salvaged: list[Record] = []
        self._migrations = migrations
        self._db: sqlite3.Connection | None = None
        self.state = self._open_or_replace()

    def reopen(self) -> bool:
        """After an error: open the file again. True: it is the same and `state` is what it holds."""
        generation = self.state.generation
        self.close()
        try:
            self.state = self._open()
        except (Damaged, QmpError, sqlite3.Error) as exc:
            self.read_only = reason(exc) if isinstance(exc, sqlite3.Error) else str(exc)
            return False
        return self.state.generation == generation and not self.read_only

    def load(self) -> list[Record]:
        """All objects in the order of their creation; damage found here is handled as at opening."""
        if self._db is None:
            return []
        try:
            return [_record(row) for row in self._db.execute(_GET)]
        except Damaged as exc:
            self._replace(str(exc))
            return []

    def apply(
        self, *, put: Iterable[Row] = (), delete: Iterable[str] = (), removing: Iterable[str], last_seq: int
    ) -> None:
        """Write all of this in one transaction, or raise sqlite3.Error and write nothing of it."""
        if self._db is None or self.read_only:
            raise sqlite3.OperationalError(self.read_only or "the registry is closed")
        old = self.state
        state = State(old.version, old.generation, last_seq, old.commits + 1, tuple(removing))
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(_DELETE, [(id_,) for id_ in delete])
            db.executemany(_PUT, put)
            db.execute(_PUT_STATE, _state_row(state))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self.state = state

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- opening ---------------------------------------------------------------------------------------------
    def _open_or_replace(self) -> State:
        try:
            return self._open()
        except Damaged as exc:
            return self._replace(str(exc))
        except sqlite3.Error as exc:
            raise QmpError(f"registry '{self.path}' cannot be read: {reason(exc)}") from exc

    def _replace(self, damage: str) -> State:
        """Take what is sound out of a damaged file, move it aside and begin a new one."""
        self.close()
        self.salvaged = salvage(self.path)
        aside = _move_aside(self.path)
        self.damage = f"registry '{self.path}' is damaged ({damage}), moved to '{aside}'"
        self.state = self._open()
        return self.state

    def _open(self) -> State:
        self.read_only = ""
        try:
            self._db = db = _connect(self.path)
        except sqlite3.OperationalError as exc:
            self.read_only = reason(exc)  # no file, and none can be made
            return State(len(self._migrations), _new_generation(), 0, 0, ())
        try:
            self._lock(db)
            state = self._check(db)
            return self._migrate(db, state)
        except sqlite3.DatabaseError as exc:
            self.close()
            if exc.sqlite_errorname.startswith(_DAMAGE):
                raise Damaged(reason(exc)) from exc
            raise
        except BaseException:
            self.close()
            raise

    def _lock(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA synchronous = OFF")
        try:
            db.execute("BEGIN EXCLUSIVE")
            db.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise QmpError(f"registry '{self.path}' is in use by another process") from exc
            if not exc.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL")):
                raise
            self.read_only = reason(exc)

    def _check(self, db: sqlite3.Connection) -> State | None:
        """The state of a sound file; None: it is empty. Raises Damaged or RegistryTooNew."""
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        known = len(self._migrations)
        if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            return None
        try:
            row = db.execute("SELECT version FROM state").fetchone()
            repeated = row[0] if row else None
        except sqlite3.OperationalError:
            repeated = version if version > known else None
        if repeated != version:
            raise Damaged(f"its schema version is {version} here and {repeated} there")
        if version > known:
            raise RegistryTooNew(
                f"registry '{self.path}' has schema version {version}, this gmemd knows {known}: "
                f"start the gmemd that wrote it, or a newer one"
            )
        verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise Damaged(" ".join(str(verdict).split()))
        return _read_state(db)

    def _migrate(self, db: sqlite3.Connection, state: State | None) -> State:
        """Bring the file to the newest version, all steps in one transaction."""
        newest = len(self._migrations)
        old = state or State(0, _new_generation(), 0, 0, ())
        if self.read_only:
            return old
        try:
            db.execute("BEGIN IMMEDIATE")
            for step in self._migrations[old.version :]:
                step(db)
            new = State(newest, old.generation, old.last_seq, old.commits, old.removing)
            db.execute("INSERT OR IGNORE INTO state VALUES (1, 0, '', 0, 0, '', 0)")
            db.execute(_PUT_STATE, _state_row(new))
            if old.version != newest:
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {newest}")
            db.execute("COMMIT")
            return new
        except sqlite3.OperationalError as exc:
            # the disk is full, say: what is there can still be read
            if db.in_transaction:
                db.execute("ROLLBACK")
            self.read_only = reason(exc)
            if old.version not in (0, newest):
                raise
            return old


def salvage(path: str) -> list[Record]:
    """All rows of a damaged file that carry a right checksum."""
    records: list[Record] = []
    try:
        db = _connect(path)
    except sqlite3.Error:
        return records
    try:
        cursor = db.execute(_GET.replace("ORDER BY seq, id", ""))
        while (row := cursor.fetchone()) is not None:
            try:
                records.append(_record(row))
            except Damaged:
                continue
    except sqlite3.Error:
        pass  # nothing more can be read
    finally:
        db.close()
    return sorted(records, key=lambda record: record.seq)


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=1, isolation_level=None, cached_statements=32)


def _new_generation() -> str:
    return secrets.token_hex(4)


def _move_aside(path: str) -> str:
    """Rename the file and its journal; the tenth one is overwritten by later ones."""
    number = next((n for n in range(1, 10) if not os.path.exists(f"{path}.damaged-{n}")), 10)
    aside = f"{path}.damaged-{number}"
    for suffix in ("-journal", ""):
        if os.path.exists(path + suffix):
            os.replace(path + suffix, aside + suffix)
    return aside


def reason(exc: sqlite3.Error) -> str:
    """The meaning of the errno behind an SQLite error, as near as SQLite tells it."""
    name = getattr(exc, "sqlite_errorname", "")
    for prefix, number in (
        ("SQLITE_FULL", errno.ENOSPC),
        ("SQLITE_IOERR_NOMEM", errno.ENOMEM),
        ("SQLITE_NOMEM", errno.ENOMEM),
        ("SQLITE_IOERR", errno.EIO),
        ("SQLITE_READONLY", errno.EROFS),
        ("SQLITE_PERM", errno.EACCES),
    ):
        if name.startswith(prefix):
            return f"{os.strerror(number)} ({name})"
    return f"{exc} ({name})" if name else str(exc)


def row_of(record: Record) -> Row:
    """The record as it is written, raises for what cannot be; the last member is a checksum of the others."""
    row = (
        record.id,
        record.seq,
        record.qom_type,
        json.dumps(record.arguments),
        record.kind,
        str(record.size),
        record.kernel,
        record.owner_uid,
        record.owner_pid,
        record.created,
        record.origin,
        json.dumps(record.extra) if record.extra else "{}",
        record.fd_name,
        f"{record.st_dev} {record.st_ino} {record.st_size}",
    )
    return (*row, _checksum(row))


def _checksum(row: Row) -> int:
    return crc32("\x1f".join(map(str, row)).encode())


def _record(row: Row) -> Record:
    if _checksum(row[:-1]) != row[-1]:
        raise Damaged(f"the checksum of object {row[0]!r} is wrong")
    id_, seq, qom_type, arguments, kind, size, kernel, uid, pid, created, origin, extra, fd_name, file = row[
        :-1
    ]
    dev, ino, st_size = map(int, file.split())
    return Record(
        *(id_, qom_type, json.loads(arguments), kind, int(size)),
        *(kernel, uid, pid, created, origin, json.loads(extra)),
        *(seq, fd_name, dev, ino, st_size),
    )


def _state_row(state: State) -> Row:
    row = (state.version, state.generation, state.last_seq, state.commits, " ".join(state.removing))
    return (*row, _checksum(row))


def _read_state(db: sqlite3.Connection) -> State:
    row = db.execute(_GET_STATE).fetchone()
    if row is None or _checksum(row[:-1]) != row[-1]:
        raise Damaged("the checksum of its state is wrong")
    version, generation, last_seq, commits, removing, _ = row
    return State(version, generation, last_seq, commits, tuple(removing.split()))

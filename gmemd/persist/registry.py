"""Record durably what each object is: one SQLite file next to the socket, living as long as the fds.

Durability. The file is in a runtime directory: a crash of the machine loses it together with the memory it describes,
so what counts is the end of a process, which leaves written bytes in the page cache. Hence no fsync (synchronous=OFF).
A rollback journal with an exclusive lock, measured on tmpfs: 18 us for a transaction of one row, 5 us a row for 64; WAL
is no faster, and a truncated WAL silently loses commits, while a truncated database is noticed. The exclusive lock also
keeps a second daemon out.

Truth. A transaction happened or did not; after an error `recover` says which. Damage is found by SQLite's
own checks and by the checksum in each row; the file is then moved aside, and its intact rows are recovered.

The tables and their versions are in tables.py.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Sequence, Set

from gmemd.errors import QmpError, mypyc_attr
from gmemd.persist.reason import reason
from gmemd.persist.record import COLUMNS, Damaged, Record, Row, State, record_of, row_of, state_row
from gmemd.persist.salvage import new_file, put_in_place, salvage
from gmemd.persist.tables import MIGRATIONS, PUT_STATE, Migration, check, migrate, roll_back
from gmemd.posix.private import make_private


class NotWritten(Exception):
    """A transaction failed; str() says why, in terms of an errno."""


_PUT = f"INSERT OR REPLACE INTO objects ({COLUMNS}) VALUES ({', '.join('?' * 15)})"
_GET = f"SELECT {COLUMNS} FROM objects"
_DELETE = "DELETE FROM objects WHERE id = ?"
_DAMAGE = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_CORRUPTFS", "SQLITE_ERROR")
_NOT_WRITABLE = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_PERM", "SQLITE_IOERR_WRITE")
_BUSY_TIMEOUT = 1  # seconds; a predecessor's lock ends with it


@mypyc_attr(allow_interpreted_subclasses=True)
class Registry:
    """An open registry. One connection, one process, one thread at a time."""

    def __init__(self, path: str, *, migrations: Sequence[Migration] = MIGRATIONS,
                 spare: Callable[[], list[Record]] = list) -> None:
        """Open or create the file; migrate it forward.

        `records` is what it holds, oldest first. A damaged file is moved aside: `damage` describes that, and `records`
        are its intact rows, with those of `spare` that it lacks. For a file that cannot be written `read_only` has the
        reason. Raises RegistryTooNew, or QmpError when another process has it open or it cannot even be read.
        """
        self.path = path
        self.changes = 0  # transactions since it was opened
        self._spare = spare
        self.read_only = ""
        self.damage = ""
        self.tightened = ""  # what was done about a file that others could open
        self.records: list[Record] = []
        self._migrations = migrations
        self._db: sqlite3.Connection | None = None
        self._cursor: sqlite3.Cursor  # of it, for all transactions
        self._tried: tuple[State, Sequence[Row]] | None = None
        self._inode = 0  # of the open file
        try:
            self.state = self._open()
        except Damaged as exc:
            self._replace(str(exc))

    def apply(self, *, put: Sequence[Row] = (), delete: Collection[str] = (), removing: Set[str] = frozenset(),
              last_seq: int) -> None:
        """Write all of this in one transaction, or raise NotWritten; then call recover().

        The rows of adds themselves show last_seq; the state is written when something is removed.
        """
        if not self._in_place():
            self._stay_in_place()
        if self._db is None or self.read_only:
            raise NotWritten(self.read_only or "it is closed")
        db = self._db
        version, generation, _, commits, starts, was_removing = self.state
        removes = bool(delete) or (bool(removing) and not removing <= set(was_removing))
        state = State(version, generation, last_seq, commits + removes, starts,
                      tuple(sorted(removing)) if removes else was_removing)
        self._tried = (state, put)
        try:
            if len(put) == 1 and not removes:
                self._cursor.execute(_PUT, put[0])  # a statement alone is a transaction, too
            else:
                _write(self._cursor, put, delete, state_row(state) if removes else None)
        except (sqlite3.Error, MemoryError) as exc:
            roll_back(db)
            raise NotWritten(reason(exc)) from exc
        self.state = state
        self.changes += 1

    def image(self) -> bytes:
        """The file as it is now; NotWritten."""
        if self._db is None or self.read_only:
            raise NotWritten(self.read_only or "it is closed")
        try:
            return self._db.serialize()
        except (sqlite3.Error, MemoryError) as exc:
            raise NotWritten(reason(exc)) from exc

    def recover(self) -> bool:
        """After a failed apply: reopen the file; did the transaction happen after all?

        Where that is not possible, `read_only` has the reason, and the transaction counts as not happened.
        """
        tried, self._tried = self._tried, None
        if self._db is not None and not self._in_place():
            return False  # the connection has the only copy
        if not self.reopen() or tried is None or self._db is None:
            return False
        (state, put), find = tried, "SELECT checksum FROM objects WHERE id = ?"
        return self.state.commits == state.commits and all(  # some rows may be as they were before
            self._db.execute(find, row[:1]).fetchone() == row[-1:] for row in put)

    def reopen(self) -> bool:
        """Reopen the file; False: it is not writable or not what it was, and `read_only` says which."""
        generation = self.state.generation
        self.close()
        try:
            state = self._open()
        except (Damaged, QmpError) as exc:
            self.read_only = str(exc)
        else:
            if state.generation == generation:
                self.state = state
            elif not self.read_only:
                self.close()
                self.read_only = "it is not the file that was opened at start"
        return not self.read_only

    def close(self) -> None:
        if self._db is not None:
            self._cursor.close()  # or the file would stay locked
            self._db.close()
            self._db = None

    def _in_place(self) -> bool:
        """Is the open file still the one at its path?"""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False
        except OSError:
            return True  # the transaction will show it

    def _stay_in_place(self) -> None:
        """Restore the file where somebody has removed it: the next daemon looks for it there."""
        if self._db is None or self.read_only:
            return
        if os.path.exists(self.path):
            raise NotWritten("it was replaced by another file")
        rescued = f"{self.path}.rescued"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(rescued)
            _make_private(rescued)
            with contextlib.closing(_connect(rescued)) as target:
                self._db.backup(target)
            self.close()
            os.rename(rescued, self.path)
        except (sqlite3.Error, OSError) as exc:
            why = reason(exc) if isinstance(exc, sqlite3.Error) else os.strerror(exc.errno or 0)
            raise NotWritten(f"it was removed and cannot be restored: {why}") from exc
        self.reopen()

    # -- opening ---------------------------------------------------------------------------------------------
    def _open(self) -> State:
        """Lock, check, migrate and read."""
        self.read_only = ""
        try:
            self.tightened = _make_private(self.path) or self.tightened
        except OSError as exc:
            raise QmpError(f"registry '{self.path}' cannot be used: {exc}") from exc
        try:
            self._db = db = _connect(self.path)
            self._cursor = db.cursor()
        except sqlite3.OperationalError as exc:
            if os.path.exists(self.path):
                raise QmpError(f"registry '{self.path}' cannot be read: {reason(exc)}") from exc
            self.read_only = reason(exc)  # it does not exist and cannot be created
            return State(len(self._migrations), os.urandom(4).hex(), 0, 0, 0, ())
        try:
            self._lock(db)
            state = check(db, self.path, len(self._migrations))
            state, self.read_only = migrate(db, self.path, self._migrations, state, self.read_only)
            if state.version:
                # all rows before the first is examined: an open cursor would keep the lock
                rows = db.execute(f"{_GET} ORDER BY seq, id").fetchall()
                self.records = [record_of(row) for row in rows]
            self._inode = os.stat(self.path).st_ino
        except sqlite3.Error as exc:
            words = reason(exc)
            self.close()
            if getattr(exc, "sqlite_errorname", _DAMAGE[0]).startswith(_DAMAGE):  # none: it is not UTF-8
                raise Damaged(words) from exc
            raise QmpError(f"registry '{self.path}' cannot be read: {words}") from exc
        except UnicodeDecodeError as exc:  # SQLite has quoted the file
            self.close()
            raise Damaged("its schema is not text") from exc
        except OSError as exc:
            self.close()
            raise QmpError(f"registry '{self.path}' cannot be read: {os.strerror(exc.errno or 0)}") from exc
        except BaseException:
            self.close()
            raise
        return state._replace(last_seq=max([state.last_seq, *(record.seq for record in self.records)]))

    def _lock(self, db: sqlite3.Connection) -> None:
        """Keep others out, and let SQLite roll back a predecessor's unfinished transaction."""
        try:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA temp_store = MEMORY")
            db.execute("BEGIN EXCLUSIVE")
            db.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorname.startswith("SQLITE_BUSY"):
                raise QmpError(f"registry '{self.path}' is in use by another process") from exc
            if not exc.sqlite_errorname.startswith(_NOT_WRITABLE):
                raise
            self.read_only = reason(exc)

    def _replace(self, damage: str) -> None:
        """Recover the intact rows of a damaged file into a new one, and keep the damaged one next to it."""
        self.close()
        sound = _united(salvage(self.path), self._spare())
        self.damage = f"registry '{self.path}' is damaged ({damage})"
        try:
            replacement = Registry(new_file(self.path), migrations=self._migrations)
            self.state, self.read_only = replacement.state, replacement.read_only
            last_seq = max((record.seq for record in sound), default=0)
            try:
                replacement.apply(put=[row_of(record) for record in sound], last_seq=last_seq)
            finally:
                replacement.close()
            aside = put_in_place(replacement.path, self.path)
        except (NotWritten, OSError) as exc:
            why = str(exc) if isinstance(exc, NotWritten) else os.strerror(exc.errno or 0)
            self.damage += f" and cannot be replaced: {why}"
            self.read_only = why
        else:
            self.damage += f": its intact records were recovered, and the damaged file is now '{aside}'"
            self.state = self._open()
        self.records = sound


def _write(db: sqlite3.Cursor, put: Sequence[Row], delete: Collection[str], state: Row | None) -> None:
    db.execute("BEGIN IMMEDIATE")
    if len(delete) == 1:
        db.execute(_DELETE, (*delete,))
    elif delete:
        db.executemany(_DELETE, [(id_,) for id_ in delete])
    if put:
        db.executemany(_PUT, put)
    if state is not None:
        db.execute(PUT_STATE, state)
    db.execute("COMMIT")


def _united(found: list[Record], spare: list[Record]) -> list[Record]:
    """The latest record of each object, oldest first; of equally old ones, what was found in the file."""
    latest = {record.id: record for record in sorted([*spare, *found], key=lambda record: record.seq)}
    return sorted(latest.values(), key=lambda record: record.seq)


def _make_private(path: str) -> str:
    """Protect a file, and its journal, which gets its mode, from others; what was done to an existing one."""
    done = make_private(path)
    return (make_private(f"{path}-journal") if os.path.lexists(f"{path}-journal") else "") or done


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None, cached_statements=32)

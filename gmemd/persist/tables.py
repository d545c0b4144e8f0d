"""The registry's tables and their versions: checking the version of a file, and migrating it.

PRAGMA user_version is the schema's version, repeated in the state row (a flipped bit in one is damage, not a newer
version). MIGRATIONS[n] makes version n + 1 of version n. A newer file is refused and left unchanged.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence

from gmemd.errors import QmpError
from gmemd.persist.reason import reason
from gmemd.persist.record import Damaged, State, state_of, state_row

Migration = Callable[[sqlite3.Connection], None]

APPLICATION_ID = 0x676D656D  # "gmem", in the header of the file

PUT_STATE = (
    "UPDATE state SET version = ?, generation = ?, last_seq = ?, commits = ?, starts = ?, removing = ?, checksum = ?"
)
GET_STATE = "SELECT version, generation, last_seq, commits, starts, removing, checksum FROM state"


class RegistryTooNew(QmpError):
    """A newer gmemd wrote this file."""


def _create(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), version INTEGER NOT NULL,"
        " generation TEXT NOT NULL, last_seq INTEGER NOT NULL, commits INTEGER NOT NULL,"
        " starts INTEGER NOT NULL, removing TEXT NOT NULL, checksum INTEGER NOT NULL)"
    )
    db.execute(
        "CREATE TABLE objects (id TEXT PRIMARY KEY, seq INTEGER NOT NULL, qom_type TEXT NOT NULL,"
        " arguments TEXT NOT NULL, kind TEXT NOT NULL, size TEXT NOT NULL, kernel TEXT NOT NULL,"
        " owner_uid INTEGER NOT NULL, owner_pid INTEGER NOT NULL, created INTEGER NOT NULL,"
        " origin TEXT NOT NULL, extra TEXT NOT NULL, fd_name TEXT NOT NULL, file TEXT NOT NULL,"
        " checksum INTEGER NOT NULL) WITHOUT ROWID"
    )


MIGRATIONS: tuple[Migration, ...] = (_create,)


def check(db: sqlite3.Connection, path: str, known: int) -> State:
    """The state of an intact file of version `known` at most; 0: it is empty. Raises Damaged or RegistryTooNew."""
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        return State(0, os.urandom(4).hex(), 0, 0, 0, ())
    repeated = _repeated_version(db)
    if version > known and repeated in (version, None):
        raise RegistryTooNew(
            f"registry '{path}' has schema version {version}, this gmemd knows {known}: "
            f"start the gmemd that wrote it, or a newer one"
        )
    if repeated != version:
        raise Damaged(f"its schema version is {version} in the header and {repeated} in the state row")
    verdict = str(db.execute("PRAGMA integrity_check(1)").fetchone()[0])
    if verdict != "ok":
        raise Damaged(" ".join(verdict.split()))
    return state_of(db.execute(GET_STATE).fetchone())


def migrate(db: sqlite3.Connection, path: str, migrations: Sequence[Migration], old: State,
            read_only: str) -> tuple[State, str]:
    """Migrate the file to the newest version in one transaction, which also shows that it is writable.

    Returns its state, and why it cannot be written; "": it can. `read_only`: the same, as far as it is known.
    """
    if read_only:
        return old, read_only
    new = old._replace(version=len(migrations), starts=old.starts + 1)
    try:
        db.execute("BEGIN IMMEDIATE")
        for step in migrations[old.version :]:
            step(db)
        db.execute("INSERT OR IGNORE INTO state VALUES (1, 0, '', 0, 0, 0, '', 0)")
        db.execute(PUT_STATE, state_row(new))
        if old.version != new.version:
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {new.version}")
        db.execute("COMMIT")
    except sqlite3.OperationalError as exc:
        words = reason(exc)
        roll_back(db)
        if old.version not in (0, new.version):
            raise QmpError(
                f"registry '{path}' cannot be migrated from schema version {old.version} "
                f"to {new.version}: {words}"
            ) from exc
        return old, words  # for example a full disk: the file can still be read
    return new, ""


def roll_back(db: sqlite3.Connection) -> None:
    """End a transaction that has failed."""
    if db.in_transaction:
        # where this fails, the journal does it when the file is reopened
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")


def _repeated_version(db: sqlite3.Connection) -> int | None:
    """The schema's version in the state row; None where it cannot be read."""
    try:
        row = db.execute("SELECT version FROM state").fetchone()
    except sqlite3.OperationalError:
        return None
    return row[0] if row else None

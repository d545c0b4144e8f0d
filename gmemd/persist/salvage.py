"""Recovery of a damaged registry: its intact rows go into a new one, the file is kept next to it."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from gmemd.persist.record import COLUMNS, Damaged, Record, record_of

COPIES = 10  # how many damaged files are kept


def salvage(path: str) -> list[Record]:
    """All rows of a damaged file that have a correct checksum, oldest first."""
    found: dict[str, Record] = {}
    # until no more can be read
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db,
        contextlib.closing(db.execute(f"SELECT {COLUMNS} FROM objects")) as cursor,
    ):
        while (row := cursor.fetchone()) is not None:
            with contextlib.suppress(Damaged):
                found[row[0]] = record_of(row)
    return sorted(found.values(), key=lambda record: record.seq)


def new_file(path: str) -> str:
    """Make room for the replacement of a registry; its path. OSError."""
    new = f"{path}.new"
    for suffix in ("-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new + suffix)
    return new


def put_in_place(new: str, path: str) -> str:
    """Replace a damaged file by a new one; one of them exists at any moment. OSError.

    Returns the damaged file's new name; later ones overwrite the tenth copy.
    """
    number = next((n for n in range(1, COPIES) if not os.path.exists(f"{path}.damaged-{n}")), COPIES)
    aside = f"{path}.damaged-{number}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)
    with contextlib.suppress(FileNotFoundError):
        os.replace(f"{path}-journal", f"{aside}-journal")  # it is not the new file's
    os.link(path, aside)
    os.replace(new, path)
    return aside

"""What becomes of a damaged registry: its sound rows go into a new one, the file is kept beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3

from gmemd.persist.record import COLUMNS, Damaged, Record, record_of

COPIES = 10  # how many damaged files are kept


def salvage(path: str) -> list[Record]:
    """All rows of a damaged file that carry a right checksum, oldest first."""
    found: dict[str, Record] = {}
    # until nothing more can be read
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
    """Where the replacement of a registry is written; nothing is there. OSError."""
    new = f"{path}.new"
    for suffix in ("-journal", ""):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new + suffix)
    return new


def put_in_place(new: str, path: str) -> str:
    """Put a new file in the place of a damaged one, at no moment without either. OSError.

    The answer is the damaged file's new name; the tenth copy is overwritten by later ones.
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

"""What becomes of a damaged registry: its sound rows are read, the file is moved aside."""

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
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db,
        contextlib.closing(db.execute(f"SELECT {COLUMNS} FROM objects")) as cursor,
    ):
        while (row := cursor.fetchone()) is not None:
            with contextlib.suppress(Damaged):
                found[row[0]] = record_of(row)
    return sorted(found.values(), key=lambda record: record.seq)


def move_aside(path: str) -> str:
    """Rename the file and its journal, the new name; the tenth copy is overwritten by later ones. OSError."""
    number = next((n for n in range(1, COPIES) if not os.path.exists(f"{path}.damaged-{n}")), COPIES)
    aside = f"{path}.damaged-{number}"
    for suffix in ("-journal", ""):
        if os.path.exists(path + suffix):
            os.replace(path + suffix, aside + suffix)
    return aside

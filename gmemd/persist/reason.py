"""Why SQLite could not read or write, as far as its code says: Python does not expose the errno."""

from __future__ import annotations

import errno
import os
import sqlite3

_CODES = (
    ("SQLITE_FULL", errno.ENOSPC),
    ("SQLITE_IOERR_NOMEM", errno.ENOMEM),
    ("SQLITE_NOMEM", errno.ENOMEM),
    ("SQLITE_READONLY", errno.EROFS),
    ("SQLITE_PERM", errno.EACCES),
    ("SQLITE_IOERR", errno.EIO),
)


def reason(exc: sqlite3.Error | MemoryError) -> str:
    """A phrase with the meaning of an errno, or SQLite's own words, and SQLite's name for the error."""
    name = "SQLITE_NOMEM" if isinstance(exc, MemoryError) else getattr(exc, "sqlite_errorname", "")
    number = next((number for prefix, number in _CODES if name.startswith(prefix)), 0)
    words = os.strerror(number) if number else str(exc)
    return f"{words} ({name})" if name else words

"""Say why SQLite could not read or write, by the errno of the system call that failed.

Python does not give sqlite3_system_errno(), so it is called here, on the connection's own handle: the first
member of CPython's connection object in every version named below. Anywhere else the errno is guessed from
SQLite's code.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import sysconfig

_KNOWN = ((3, 11), (3, 12), (3, 13), (3, 14))  # versions whose connection object begins with the sqlite3 *

_GUESSES = (
    ("SQLITE_FULL", errno.ENOSPC),
    ("SQLITE_IOERR_NOMEM", errno.ENOMEM),
    ("SQLITE_NOMEM", errno.ENOMEM),
    ("SQLITE_READONLY", errno.EROFS),
    ("SQLITE_PERM", errno.EACCES),
    ("SQLITE_IOERR", errno.EIO),
)


def reason(exc: sqlite3.Error | MemoryError, db: sqlite3.Connection | None = None) -> str:
    """A phrase with the errno's meaning and SQLite's name for it; `db`: the open connection that failed."""
    name = "SQLITE_NOMEM" if isinstance(exc, MemoryError) else getattr(exc, "sqlite_errorname", "")
    number = system_errno(db) if db is not None and name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) else 0
    if not number:
        number = next((guess for prefix, guess in _GUESSES if name.startswith(prefix)), 0)
    words = os.strerror(number) if number else str(exc)
    return f"{words} ({name})" if name else words


def system_errno(db: sqlite3.Connection) -> int:
    """The errno of the connection's last failed system call; 0: unknown."""
    if sys.implementation.name != "cpython" or sys.version_info[:2] not in _KNOWN:
        return 0
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return 0
    try:
        import _sqlite3
        import ctypes

        function = ctypes.CDLL(_sqlite3.__file__).sqlite3_system_errno  # found through the module's dependencies
    except (ImportError, AttributeError, OSError):
        return 0
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int
    handle = ctypes.c_void_p.from_address(id(db) + object.__basicsize__)
    return int(function(handle)) if handle.value else 0

"""Directories and files that other users could replace: whoever can replace a socket gets what is sent to it.

Modes are checked and set here, whatever the umask. Imports little: the keeper uses it.
"""

from __future__ import annotations

import contextlib
import os
import stat

PRIVATE = 0o600


def exposed(directory: str) -> str:
    """The first directory on the path to this one in which others may replace entries; "": there is none.

    Others are all users, and all groups but our own. In a sticky directory nobody can replace our entries.
    """
    asked = os.path.abspath(directory)
    for path in (*_way(asked), *_way(os.path.realpath(asked))):
        try:
            status = os.stat(path)
        except OSError:
            continue  # it does not exist, or using it will say why it cannot be used
        by_group = status.st_mode & stat.S_IWGRP and status.st_gid not in (0, os.getegid())
        if (by_group or status.st_mode & stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX:
            return path
    return ""


def make_private(path: str) -> str:
    """Create a file that only this user can read, or restrict the existing one; return what was changed.

    OSError for one that another user may have put there. One that cannot be created or opened is left to the caller.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        with contextlib.suppress(OSError), os.fdopen(os.open(path, _MAKE, PRIVATE), "rb") as file:
            os.fchmod(file.fileno(), PRIVATE)
        return ""
    if stat.S_ISLNK(status.st_mode):
        raise OSError("it is a symbolic link")
    if status.st_uid not in _owners(path):
        raise OSError(f"it belongs to user {status.st_uid}")
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o077:
        return ""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        os.fchmod(file.fileno(), PRIVATE)
    return f"others could open '{path}' (mode {stat.S_IMODE(status.st_mode):04o}): it is 0600 now"


_MAKE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def _owners(path: str) -> set[int]:
    """Users that may own a file of ours; root may manage the directory of another user."""
    own = os.geteuid()
    return {own, 0} if own else {0, os.stat(os.path.dirname(os.path.abspath(path))).st_uid}


def _way(path: str) -> list[str]:
    """The directories from / to this one."""
    way = [path]
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        way.append(path)
    return way[::-1]

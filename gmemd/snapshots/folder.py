"""Folders below a root: a draft, which becomes a snapshot by one rename, and what drafts leave behind.

A draft is locked (flock(2)) by the process that writes it, so an unlocked one belongs to nobody and is swept away.
Names have no slash, and every folder is opened by openat2 beneath the root, following no link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Iterator
from typing import Final

from gmemd.errors import QmpError, close_fd
from gmemd.kernel import uapi
from gmemd.kernel.syscalls import open_beneath, rename

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]*")
_LONGEST: Final = 200
_DRAFT: Final = re.compile(r"\..+\.tmp-[0-9a-f]{8}")
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a snapshot."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST:
        raise QmpError(f"'{name}' cannot be the name of a snapshot: letters, digits and ._@- after a letter or a digit,"
                       f" up to {_LONGEST}")


def open_folder(root: int, name: str) -> int:
    """The descriptor of a snapshot's folder, which the caller owns; QmpError if there is no such snapshot."""
    check_name(name)
    try:
        return open_beneath(root, name, _FOLDER)
    except OSError as exc:
        if exc.errno == errno.ENOENT:
            raise QmpError(f"snapshot '{name}' not found") from exc
        raise QmpError(f"cannot open snapshot '{name}': {os.strerror(exc.errno or 0)}") from exc


def names(root: int) -> list[str]:
    """The names of what may be snapshots, sorted; each is one once its manifest has been read."""
    return sorted(name for name in os.listdir(root) if _NAME.fullmatch(name) and len(name) <= _LONGEST)


class Draft:
    """A folder that is being written: `fd`, and its present name. Locked as long as it is open."""

    def __init__(self, root: int, name: str) -> None:
        self._root, self._final = root, name
        while True:
            self.name = f".{name}.tmp-{os.urandom(4).hex()}"
            os.mkdir(self.name, 0o700, dir_fd=root)
            with contextlib.suppress(FileNotFoundError):  # swept before it was locked
                self.fd = open_beneath(root, self.name, _FOLDER)
                fcntl.flock(self.fd, fcntl.LOCK_EX)
                if _is_there(root, self.name, self.fd):
                    return
                close_fd(self.fd)

    def publish(self, *, replace: bool = False) -> None:
        """Give it its name, durably; in place of the snapshot with that name, which is removed then."""
        os.fsync(self.fd)
        try:
            rename(self._root, self.name, self._final, uapi.RENAME_EXCHANGE if replace else uapi.RENAME_NOREPLACE)
        except FileExistsError:
            raise QmpError(f"snapshot '{self._final}' exists already") from None
        old, self.name = self.name, ""  # from here on it is the snapshot, whatever fails
        os.fsync(self._root)
        if replace:
            with contextlib.suppress(OSError), open_draft(self._root, old) as fd:
                _empty(self._root, old, fd)

    def abandon(self) -> None:
        """Remove it, unless it was published."""
        if self.name:
            with contextlib.suppress(OSError):
                _empty(self._root, self.name, self.fd)
        close_fd(self.fd)


@contextlib.contextmanager
def draft(root: int, name: str) -> Iterator[Draft]:
    """A draft that is removed at the end of the block unless it was published in it."""
    made = Draft(root, name)
    try:
        yield made
    finally:
        made.abandon()


@contextlib.contextmanager
def open_draft(root: int, name: str) -> Iterator[int]:
    """The descriptor of a folder by its present name."""
    fd = open_beneath(root, name, _FOLDER)
    try:
        yield fd
    finally:
        close_fd(fd)


def remove(root: int, name: str) -> None:
    """Delete a snapshot: it is whole until one rename, and absent, durably, from then on."""
    check_name(name)
    hidden = f".{name}.tmp-{os.urandom(4).hex()}"
    try:
        with open_draft(root, name) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # whoever may open the directory could hold the lock
            rename(root, name, hidden, uapi.RENAME_NOREPLACE)
            os.fsync(root)
            with contextlib.suppress(OSError):  # what is left is swept
                _empty(root, hidden, fd)
    except FileNotFoundError:
        raise QmpError(f"snapshot '{name}' not found") from None


def sweep(root: int) -> int:
    """Remove drafts that nobody writes any more; their number."""
    count = 0
    for name in os.listdir(root):
        if not _DRAFT.fullmatch(name):
            continue
        with contextlib.suppress(OSError), open_draft(root, name) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(root, name, fd):
                _empty(root, name, fd)
                count += 1
    return count


def _is_there(root: int, name: str, fd: int) -> bool:
    """Whether the name still means the open folder."""
    try:
        found = os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _empty(root: int, name: str, fd: int) -> None:
    """Remove a folder and the files in it."""
    for file in os.listdir(fd):
        os.unlink(file, dir_fd=fd)
    os.rmdir(name, dir_fd=root)

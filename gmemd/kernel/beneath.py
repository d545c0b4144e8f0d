"""Files by path, opened for somebody who is not trusted with all that this process may open."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from gmemd.kernel import syscalls


@dataclass(frozen=True)
class Paths:
    """Files as the functions of `os` find them; with `root` only below that directory.

    No symbolic link is followed from there on, so whoever may rename things there cannot lead anywhere else. OSError
    ELOOP or EXDEV: the path leads out of it.
    """

    root: str = ""

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        """As open(2); the caller owns the fd."""
        if not self.root:
            return os.open(path, flags, mode)
        with self._held(self.root) as root:
            return syscalls.open_beneath(root, self._relative(path), flags, mode if flags & os.O_CREAT else 0)

    def stat(self, path: str) -> os.stat_result:
        """As stat(2)."""
        if not self.root:
            return os.stat(path)
        fd = self.open(path, os.O_PATH)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        """As unlink(2)."""
        with self._directory(path) as (directory, name):
            os.unlink(name, dir_fd=directory)

    def rename(self, path: str, to: str) -> None:
        """As rename(2)."""
        with self._directory(path) as (before, name), self._directory(to) as (after, new):
            os.rename(name, new, src_dir_fd=before, dst_dir_fd=after)

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[tuple[int | None, str]]:
        """The directory of a path, and the name in it; with None for the directory, from where the process is."""
        if not self.root:
            yield None, path
            return
        above, name = os.path.split(self._relative(path))
        with self._held(self.root) as root:
            directory = syscalls.open_beneath(root, above or ".", os.O_PATH | os.O_DIRECTORY)
        try:
            yield directory, name
        finally:
            os.close(directory)

    @staticmethod
    @contextlib.contextmanager
    def _held(root: str) -> Iterator[int]:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def socket(self, path: str) -> Iterator[str]:
        """Where to connect to the socket at a path, meanwhile."""
        if not self.root:
            yield path
            return
        fd = self.open(path, os.O_PATH)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def creating(self, path: str) -> Iterator[str]:
        """Where to create a socket that is to be at a path, meanwhile."""
        with self._directory(path) as (directory, name):
            yield name if directory is None else f"/proc/self/fd/{directory}/{name}"

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self.root)


ANYWHERE = Paths()

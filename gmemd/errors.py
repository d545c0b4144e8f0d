"""The one error that reaches a client, and the one place where OSError becomes it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

TYPE_CHECKING = False  # as of typing, which the keeper does without
if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr as mypyc_attr
else:
    def mypyc_attr(**_: object) -> Callable[[type], type]:
        """What a compiled build is told about a class (setup.py); nothing is to be done about it here."""
        return lambda cls: cls

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"
DEVICE_NOT_ACTIVE = "DeviceNotActive"


class QmpError(Exception):
    """A refusal as the client sees it: {"error": {"class": error_class, "desc": desc}}."""

    def __init__(self, desc: str, error_class: str = GENERIC_ERROR) -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


class NotLoaded(Exception):
    """What is asked for needs this to be loaded first, off the event loop; nothing has happened yet."""


class os_errors:  # noqa: N801  # reads as the function that contextlib would make of it, at a third of the cost
    """Turn an OSError of the enclosed system call into QmpError "DOING: STRERROR"."""

    __slots__ = ("_doing",)

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise QmpError(f"{self._doing}: {os.strerror(error.errno or 0)}") from error


def close_fd(fd: int) -> None:
    """Close a descriptor for good: the number is free, whatever close(2) reports about the file.

    A full disk or a lost server shows there (close(2), "Dealing with error returns"), too late to act on.
    """
    try:
        os.close(fd)
    except OSError as exc:
        if exc.errno == errno.EBADF:  # not an open one: a bug
            raise

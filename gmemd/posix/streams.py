"""The standard streams of a program: opening missing ones, and last words that nobody has to read."""

from __future__ import annotations

import os
import sys

from gmemd.posix.lines import Lines

_PATIENCE = 1.0  # seconds


def open_standard_streams() -> None:
    """Open /dev/null on those of the descriptors 0, 1 and 2 that are closed; call it before anything is opened.

    Otherwise the next socket or memory would become standard error, and what is written there would end up in it.
    """
    while (fd := _open_null()) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # what Python has for a closed one
            stream = open(number, mode, errors="backslashreplace", closefd=False)  # noqa: SIM115  # to the end
            setattr(sys, name, stream)


def say(text: str) -> None:
    """Write to standard error before the end, without waiting long for a reader."""
    try:
        fd = sys.stderr.fileno()
    except (OSError, ValueError):  # it is not a file
        print(text, file=sys.stderr)
        return
    lines = Lines(fd, excuse=lambda count: b"")
    lines.write(f"{text}\n".encode("utf-8", "backslashreplace"))
    lines.wait(_PATIENCE)


def _open_null() -> int:
    try:
        return os.open(os.devnull, os.O_RDWR)
    except OSError:  # in a chroot without devices
        return os.open("/", os.O_PATH)

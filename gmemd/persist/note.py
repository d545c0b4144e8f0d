"""A copy of the registry on the disk, so that memory that a kexec did not carry is reported lost.

After any other reboot everybody expects memory to be gone, and its ids are free. So the copy is left only by a daemon
that stops while a kernel is loaded for kexec, and serves only the boot after it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from gmemd.persist.carried import Copy, parsed
from gmemd.persist.nobody import AnyCustody
from gmemd.persist.registry import NotWritten

_NAME = "before-kexec"
_LOADED = "/sys/kernel/kexec_loaded"


def leave(custody: AnyCustody, directory: str, loaded: str = _LOADED) -> str:
    """Leave the copy in `directory` if a kexec may come; why that failed, "" if it did not. `loaded`: what says so."""
    try:
        if Path(loaded).read_text().strip() != "1":
            return ""
    except OSError:
        return ""
    path = os.path.join(directory, _NAME)
    try:
        custody.copies.leave(path)
    except (OSError, NotWritten) as exc:
        return f"what a kexec does not carry cannot be noted in '{path}': {exc}"
    return ""


def take(directory: str, boot: str) -> Copy | None:
    """The copy that the boot before this one left; it is removed."""
    path = Path(directory, _NAME)
    try:
        copy = parsed(path.read_bytes())
    except OSError:
        return None
    with contextlib.suppress(OSError):
        path.unlink()
    return None if copy is None or copy.boot == boot else copy

"""What snapshots there are in a directory, and what each says of itself. All functions block.

`directory` is a descriptor, borrowed. A folder is taken for a snapshot if there is any file of one in it, so a damaged
one is listed, too, with what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, NamedTuple

from gmemd.errors import QmpError, close_fd
from gmemd.snapshots import folder, manifest

# Every file that a folder may hold; one with any other is not ours to delete.
FILES: Final = frozenset((manifest.NAME, "memory.raw", "memory.zst", "map.bin", "digests.bin", "private.raw",
                          "private.zst", "private-map.bin", "private-digests.bin", "vmstate"))


class Entry(NamedTuple):
    """What is known of a snapshot."""

    name: str
    manifest: dict[str, Any]  # {} if it cannot be used
    problem: str  # why; "": it can
    bytes: int  # on the disk
    stamp: tuple[int, ...]  # inode and time of the last change, of its folder and of its manifest


def scan(directory: int, known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Everything that is there now, by name; what has not changed is taken from `known`."""
    found: dict[str, Entry] = {}
    for name in folder.names(directory):
        with suppress(QmpError, OSError):  # it is not a folder, or has just gone
            fd = folder.open_folder(directory, name)
            try:
                before, stamp = known.get(name), _stamp(fd)
                if before is not None and before.stamp == stamp:
                    found[name] = before
                elif not FILES.isdisjoint(os.listdir(fd)):
                    found[name] = _look(fd, name, stamp)
            finally:
                close_fd(fd)
    return found


def _stamp(fd: int) -> tuple[int, ...]:
    found = [os.fstat(fd)]
    with suppress(OSError):
        found.append(os.stat(manifest.NAME, dir_fd=fd, follow_symlinks=False))
    return tuple(number for status in found for number in (status.st_ino, status.st_mtime_ns))


def _look(fd: int, name: str, stamp: tuple[int, ...]) -> Entry:
    members: dict[str, Any] = {}
    problem = ""
    try:
        members, _ = manifest.read(fd, name)
    except QmpError as exc:
        problem = exc.desc
    with os.scandir(fd) as files:
        size = sum([file.stat(follow_symlinks=False).st_blocks for file in files]) * 512
    return Entry(name, members, problem, size, stamp)


def delete(directory: int, name: str) -> None:
    """Delete a snapshot; QmpError if there is none, or the folder is not (only) one, or is another user's."""
    fd = folder.open_folder(directory, name)
    try:
        strange = sorted(set(os.listdir(fd)) - FILES)
        owner = os.fstat(fd).st_uid
    finally:
        close_fd(fd)
    if strange:
        raise QmpError(f"snapshot '{name}' is not deleted: '{strange[0]}' in its folder is not a file of a snapshot")
    if owner not in (os.geteuid(), os.fstat(directory).st_uid):
        raise QmpError(f"snapshot '{name}' is not deleted: its folder belongs to user {owner}")
    folder.remove(directory, name)

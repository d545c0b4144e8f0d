"""Storing a snapshot in another form, in its place: flatten makes a full one of any, cold a compressed one.

The new folder takes the old one's name in one step (renameat2 EXCHANGE): there is always one whole snapshot. Both keep
its id: it is the same memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

from gmemd.errors import QmpError, os_errors
from gmemd.snapshots import manifest
from gmemd.snapshots.cold import ColdHalf, zstd
from gmemd.snapshots.folder import Draft, draft, names, open_folder
from gmemd.snapshots.half import Half
from gmemd.snapshots.save import Message, Saving, Talk, progress
from gmemd.snapshots.stored import Part, Stored, files_of

_OWN: Final = ("format", "version", "parts", "parent", "sha256")  # members that the new manifest has of its own


def flatten(spec: Message) -> Talk:
    """Store a delta or a compressed snapshot, {"root": fd, "name"}, in full: it needs no parent then."""
    def writer(made: Draft, stored: Stored, part: str, source: Part) -> Half:
        return Half(made.fd, part, stored.size, stored.name, source.base, delta=False)

    with Stored(spec["root"], spec["name"]) as stored:
        if all([part.whole for part in stored.parts.values()]):
            raise QmpError(f"snapshot '{stored.name}' is stored in full already")
        return (yield from _rewrite(spec["root"], stored, writer))


def cold(spec: Message) -> Talk:
    """Compress a snapshot, {"root": fd, "name"}; a delta is then compressed as a whole, without its parent."""
    def writer(made: Draft, stored: Stored, part: str, source: Part) -> ColdHalf:
        return ColdHalf(made.fd, part, files_of(part)[1:], stored.size, stored.name)

    zstd()
    with Stored(spec["root"], spec["name"]) as stored:
        if not stored.parts or all([part.is_cold for part in stored.parts.values()]):
            raise QmpError(f"snapshot '{stored.name}' is compressed already or holds no memory")
        needed = children(spec["root"], stored.manifest["id"])
        if needed:
            raise QmpError(f"snapshot '{stored.name}' is the parent of '{needed[0]}': flatten that first")
        return (yield from _rewrite(spec["root"], stored, writer))


def children(root: int, snapshot_id: str) -> list[str]:
    """The names of the deltas that need a snapshot, by its id."""
    return [name for name, members in manifests(root)
            if members.get("parent", {}).get("id") == snapshot_id
            and any([part["stored"] == "delta" for part in members["parts"].values()])]


def manifests(root: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, manifest) of each snapshot below a root whose manifest can be read."""
    for name in names(root):
        with contextlib.suppress(QmpError):
            folder = open_folder(root, name)
            try:
                yield name, manifest.read(folder, name)[0]
            finally:
                os.close(folder)


def _rewrite(root: int, stored: Stored, writer: Callable[[Draft, Stored, str, Part], Half | ColdHalf]) -> Talk:
    """Write every part anew, and put the result in the place of the old one."""
    what = f"cannot rewrite snapshot '{stored.name}'"
    stored.check_state()
    with contextlib.ExitStack() as opened:
        with os_errors(what):
            made = opened.enter_context(draft(root, stored.name))
        saving = Saving(made, stored.name, stored.size)
        opened.callback(saving.close)
        for part, source in stored.parts.items():
            saving.put(part, writer(made, stored, part, source), source)
        yield {"total": saving.total()}
        yield from progress(saving.take(None), 0)
        old = stored.manifest
        with os_errors(what):
            if "device-state" in old:
                os.link(old["device-state"]["file"], old["device-state"]["file"], src_dir_fd=stored.folder,
                        dst_dir_fd=made.fd)
        size = saving.finish({name: value for name, value in old.items() if name not in _OWN})
        with os_errors(what):
            made.publish(replace=True)
        return {"id": old["id"], "bytes": size}


VERBS: Final = {"flatten": flatten, "cold": cold}

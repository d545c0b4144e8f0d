"""Find an object that outlasts its users, or create it: a restarted program has the memory of its last run."""

from __future__ import annotations

import contextlib
from typing import Any

from gmemd.client.client import Client, ProtocolError
from gmemd.errors import DEVICE_NOT_FOUND, QmpError

PREPARE_SECONDS = 600.0  # seconds; what preallocation may take

# What may differ from an earlier run: how the memory is prepared, not what it is.
_OF_NO_MOMENT = frozenset({"id", "qom-type", "prealloc", "prealloc-threads", "dump", "merge",
                           "x-use-canonical-path-for-ramblock-id"})


def obtain(client: Client, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Find or create the object that object-add arguments describe; its fd and MemdevFd, now the caller's.

    Of an existing object only the given properties are compared, sizes in bytes; it is preallocated if requested.
    QmpError when it cannot be created, or exists with other properties; what was created for it is deleted then.
    """
    made = not _found(client, wanted)
    if made:
        client.execute("object-add", wanted, timeout=PREPARE_SECONDS if wanted.get("prealloc") else None)
    try:
        info, fds = client.execute_fds("memdev-get-fd", {"id": wanted["id"]})
        if not fds:
            raise ProtocolError("it passed no descriptor")
    except BaseException:
        if made:
            with contextlib.suppress(QmpError, OSError):
                client.execute("object-del", {"id": wanted["id"]})
        raise
    return fds[0], info


def _found(client: Client, wanted: dict[str, Any]) -> bool:
    """Whether the object exists; it is preallocated now if requested. QmpError if it is another one."""
    path = f"/objects/{wanted['id']}"
    try:
        [answer] = client.execute("qom-list-get", {"paths": [path]})
    except QmpError as exc:
        if exc.error_class != DEVICE_NOT_FOUND:
            raise
        return False
    there = {row["name"]: row.get("value") for row in answer["properties"]}
    if there["type"] != wanted["qom-type"]:
        raise _another(wanted, "qom-type")
    automatic = {"rom": "on" if wanted.get("readonly") else "off"}  # an object shows its actual value
    for name, given in wanted.items():
        value = automatic.get(name, given) if given == "auto" else given
        if name not in _OF_NO_MOMENT and there.get(name) != value:
            raise _another(wanted, name)
    if wanted.get("prealloc") and not there["prealloc"]:
        client.execute("qom-set", {"path": path, "property": "prealloc", "value": True},
                       timeout=PREPARE_SECONDS)
    return True


def _another(wanted: dict[str, Any], name: str) -> QmpError:
    return QmpError(f"object '{wanted['id']}' is left from an earlier run with another '{name}': delete it first")

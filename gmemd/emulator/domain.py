"""A domain's memory objects in a running gmemd: they outlast the emulator, and its next start finds them.

An object `ram-node0` of the domain with UUID U is the daemon's object `vm-U.ram-node0`.  Every call makes a
connection of its own and blocks: run it in a thread.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from gmemd.client.client import Client, ProtocolError
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.posix.sockets import path_of

ANSWER_SECONDS = 30.0  # after which a gmemd that does not answer is given up
PREPARE_SECONDS = 600.0  # what memory may take to be allocated in advance

# What only the emulator knows.
_OF_OURS = frozenset({"prealloc-context"})

# What may differ from an earlier run: how the memory is prepared, not what it is.
_OF_NO_MOMENT = frozenset({"id", "qom-type", "prealloc", "prealloc-threads", "dump", "merge",
                           "x-use-canonical-path-for-ramblock-id"})


class Domain:
    """The objects of one domain at the gmemd that listens on `path`, which is as in GMEMD_SOCKET."""

    def __init__(self, path: str, uuid: str | None, name: str | None, *, answer: float = ANSWER_SECONDS) -> None:
        self.path = path_of(path)
        self._answer = answer  # seconds
        self._who = uuid or re.sub(r"[^A-Za-z0-9.-]", lambda match: f"_{ord(match[0]):x}_", name or "")

    def daemon_id(self, object_id: str) -> str:
        """The daemon's id of an object; QmpError if nobody knows which domain this is."""
        if not self._who:
            raise QmpError("memory that outlasts the emulator needs -uuid or -name")
        return f"vm-{self._who}.{object_id}"

    def obtain(self, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Find or make the object that complete object-add arguments describe; its fd and MemdevFd, now the caller's.

        QmpError when it cannot be made, or is there and of another kind; what was made for it is deleted then.
        """
        daemon_id = self.daemon_id(arguments["id"])
        wanted = {name: value for name, value in arguments.items() if name not in _OF_OURS} | {"id": daemon_id}
        with self._talk(arguments["id"]) as client:
            made = not _found(client, wanted)
            if made:
                client.execute("object-add", wanted, timeout=PREPARE_SECONDS if wanted["prealloc"] else None)
            try:
                info, fds = client.execute_fds("memdev-get-fd", {"id": daemon_id})
                if not fds:
                    raise ProtocolError("it passed no descriptor")
            except BaseException:
                if made:
                    with contextlib.suppress(QmpError, OSError, ProtocolError):
                        client.execute("object-del", {"id": daemon_id})
                raise
        return fds[0], info

    def delete(self, object_id: str) -> None:
        """Delete an object, unless somebody has done so; QmpError when it cannot be deleted."""
        with self._talk(object_id) as client:
            try:
                client.execute("object-del", {"id": self.daemon_id(object_id)})
            except QmpError as exc:
                if exc.desc != f"object '{self.daemon_id(object_id)}' not found":
                    raise

    @contextlib.contextmanager
    def _talk(self, object_id: str) -> Iterator[Client]:
        """A connection, about an object; what is wrong is told of the object by its id here."""
        try:
            with Client(self.path, timeout=self._answer) as client:
                yield client
        except TimeoutError as exc:
            raise QmpError(f"gmemd at {self.path} does not answer: it took too long") from exc
        except (OSError, ProtocolError) as exc:
            raise QmpError(f"gmemd at {self.path} does not answer: {exc}") from exc
        except QmpError as exc:
            raise QmpError(exc.desc.replace(self.daemon_id(object_id), object_id), exc.error_class) from exc


def _found(client: Client, wanted: dict[str, Any]) -> bool:
    """Whether the object is there; it is preallocated now if that is wanted. QmpError if it is another one."""
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
    automatic = {"rom": "on" if wanted.get("readonly") else "off"}  # an object tells what it came to
    for name, given in wanted.items():
        value = automatic.get(name, given) if given == "auto" else given
        if name not in _OF_NO_MOMENT and there.get(name) != value:
            raise _another(wanted, name)
    if wanted["prealloc"] and not there["prealloc"]:
        client.execute("qom-set", {"path": path, "property": "prealloc", "value": True},
                       timeout=PREPARE_SECONDS)
    return True


def _another(wanted: dict[str, Any], name: str) -> QmpError:
    return QmpError(f"object '{wanted['id']}' is left from an earlier run with another '{name}': delete it first")

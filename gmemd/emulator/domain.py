"""A domain's memory objects in a running gmemd: they outlast the emulator, and its next start finds them.

An object `ram-node0` of the domain with UUID U is the daemon's object `vm-U.ram-node0`.  Every call opens its own
connection and blocks: run it in a thread.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from gmemd.client.client import Client, ProtocolError
from gmemd.client.obtain import obtain
from gmemd.errors import QmpError
from gmemd.posix.sockets import path_of

ANSWER_SECONDS = 30.0  # seconds; after that it gives up on a gmemd that does not answer


class Domain:
    """The objects of one domain at the gmemd that listens on `path`, which is as in GMEMD_SOCKET."""

    def __init__(self, path: str, uuid: str | None, name: str | None, *, answer: float = ANSWER_SECONDS) -> None:
        self.path = path_of(path)
        self._answer = answer  # seconds
        self._who = uuid or re.sub(r"[^A-Za-z0-9.-]", lambda match: f"_{ord(match[0]):x}_", name or "")

    def daemon_id(self, object_id: str) -> str:
        """The daemon's id of an object; QmpError if it is unknown which domain this is."""
        if not self._who:
            raise QmpError("memory that outlasts the emulator needs -uuid or -name")
        return f"vm-{self._who}.{object_id}"

    def obtain(self, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Find or create the object that complete object-add arguments describe, as gmemd.client.obtain does."""
        wanted = {**arguments, "id": self.daemon_id(arguments["id"])}
        wanted.pop("prealloc-context", None)  # an object that only the emulator has
        with self._talk(arguments["id"]) as client:
            return obtain(client, wanted)

    def delete(self, object_id: str) -> None:
        """Delete an object, if it still exists; QmpError when it cannot be deleted."""
        with self._talk(object_id) as client:
            try:
                client.execute("object-del", {"id": self.daemon_id(object_id)})
            except QmpError as exc:
                if exc.desc != f"object '{self.daemon_id(object_id)}' not found":
                    raise

    @contextlib.contextmanager
    def _talk(self, object_id: str) -> Iterator[Client]:
        """A connection for an object; errors name the object by its id here."""
        try:
            with Client(self.path, timeout=self._answer) as client:
                yield client
        except TimeoutError as exc:
            raise QmpError(f"gmemd at {self.path} does not answer: it took too long") from exc
        except (OSError, ProtocolError) as exc:
            raise QmpError(f"gmemd at {self.path} does not answer: {exc}") from exc
        except QmpError as exc:
            raise QmpError(exc.desc.replace(self.daemon_id(object_id), object_id), exc.error_class) from exc

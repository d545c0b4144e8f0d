"""The gmemd of this node, as its operator sees it: connections that are kept, one for each command in progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from gmemd.client.client import Client
from gmemd.errors import DEVICE_NOT_FOUND, GENERIC_ERROR, QmpError

T = TypeVar("T")

_WAIT = 5.0  # seconds for one that is just being restarted


class House:
    """Connections to the socket of a gmemd, for any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._idle: deque[Client] = deque()

    def ask(self, work: Callable[[Client], T]) -> T:
        """Do what needs a connection, and again from the start on a new one if gmemd ends meanwhile.

        `work` has to be such that doing it twice is doing it once. QmpError if gmemd refuses or does not answer.
        """
        try:
            with self._connected(fresh=False) as client:
                return work(client)
        except ConnectionError:
            self.close()
        try:
            with self._connected(fresh=True) as client:
                return work(client)
        except ConnectionError as exc:
            raise self._silent(exc) from exc

    def close(self) -> None:
        """Close what is idle."""
        with suppress(IndexError):  # other threads take some meanwhile
            while True:
                self._idle.popleft().close()

    @contextmanager
    def _connected(self, *, fresh: bool) -> Iterator[Client]:
        client = None
        with suppress(IndexError):
            client = None if fresh else self._idle.pop()
        if client is None:
            try:
                client = Client(self._path, wait=_WAIT)
            except OSError as exc:
                raise self._silent(exc) from exc
        try:
            yield client
        except QmpError:
            self._idle.append(client)
            raise
        except BaseException:
            client.close()
            raise
        self._idle.append(client)

    def _silent(self, exc: OSError) -> QmpError:
        return QmpError(f"gmemd does not answer at '{self._path}': {exc.strerror or exc}")


def exists(client: Client, name: str) -> bool:
    """Whether there is an object of that name."""
    try:
        client.execute("qom-list", {"path": f"/objects/{name}"})
    except QmpError as exc:
        if exc.error_class != DEVICE_NOT_FOUND:
            raise
        return False
    return True


def find_room(client: Client, uid: str) -> dict[str, Any] | None:
    """The room of a claim, if it has been made."""
    try:
        found: dict[str, Any] = client.execute("query-memdev-rooms", {"id": uid})[0]
    except QmpError as exc:
        if exc.error_class != GENERIC_ERROR:  # the policy has taken the command away: it may well be there
            raise
        return None
    return found

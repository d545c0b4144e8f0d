"""Custody where nothing is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from gmemd.persist.waits import Flush

if TYPE_CHECKING:
    from gmemd.persist.batch import Operation
    from gmemd.persist.custody import Custody
    from gmemd.persist.record import Record

AnyCustody: TypeAlias = "Custody | Nobody"


class NoCopies:
    """No registry, no copy of it."""

    due = 0
    stored = False

    def ask(self, entries: object) -> None: ...

    def leave(self, path: str) -> None: ...


class Nobody:
    """Custody where nothing is kept: everything is done at once, and as durable as it can be."""

    keeps: Literal[False] = False
    dirty = False
    read_only = ""
    trouble = ""
    copies = NoCopies()
    room = (0, 0)
    steady: tuple[int, ...] = ()

    def reserve(self) -> None: ...

    def release(self) -> None: ...

    def allow(self, limit: int, handed_down: int) -> None: ...

    def retry(self) -> None: ...

    def rewrite(self, records: list[Record]) -> None: ...

    def withdraw(self, operation: Operation) -> None: ...

    def flush(self) -> Flush:
        yield from ()

    def flush_blocking(self) -> None: ...

    def close(self) -> None: ...

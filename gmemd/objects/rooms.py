"""Made rooms: rooms that have a name instead of a tenant, with a socket whose clients see nothing else.

A made room is a record without memory in the registry, so it comes back with its objects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.objects.names import is_uid
from gmemd.persist.record import Record

ROOM: Final = "room"  # the registry's type of one
_RECORD_ID: Final = "@{}"  # and its id there, which no object can have
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,62}")


@dataclass(eq=False)
class MadeRoom:
    """What a room was made with."""

    id: str
    socket: str = ""  # path; "": it has none
    namespace: str = ""  # whose objects they are, by the policy; "": nobody's
    note: str = ""  # the maker's words
    limits: Mapping[str, int] = field(default_factory=dict)  # by the names of the policy's
    root: str = ""  # the directory that its socket's path must not leave; "": any
    record: Record | None = None  # what custody knows of it; None: it is not kept
    trouble: str = ""  # why nobody can connect, though there is a socket

    def said(self) -> dict[str, Any]:
        """The arguments that it was made with."""
        return {name: value for name in ("socket", "namespace", "note", "limits") if (value := getattr(self, name))}

    def recorded(self, owner: tuple[int, int]) -> Record:
        """A new record of it, for custody; `owner`: uid and pid of who made it."""
        return Record(_RECORD_ID.format(self.id), ROOM, self.said(), ROOM, 0, owner_uid=owner[0], owner_pid=owner[1],
                      extra={"root": self.root} if self.root else {})

    @classmethod
    def of(cls, record: Record) -> MadeRoom:
        """The room that a record describes."""
        return cls(record.id[1:], **record.arguments, root=record.extra.get("root", ""), record=record)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a made room."""
    if not _NAME.fullmatch(name) or is_uid(name):
        raise QmpError(f"'{name}' cannot be a room's id: up to 63 letters, digits and '-', not only digits, are one")

"""What one client may: its role, and what its rule of the policy adds and takes away.

Commands do not ask for a uid. What a client may use at all is decided before a command runs, by `Rights.commands`; a
command asks its caller's rights only for what cannot be known before: the type of an object, the path of a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from gmemd.errors import COMMAND_NOT_FOUND, QmpError

_NONE: Final[Mapping[str, int]] = MappingProxyType({})


class Role(IntEnum):
    """Each may use the commands of those before it; the schema says of every command which is the least."""

    NONE = 0  # is not let in
    OBSERVER = 1  # sees all, and only reads
    MEMBER = 2  # uses what is in a made room, and creates and deletes nothing
    TENANT = 3  # has a room of its own; does not see what others have
    OPERATOR = 4  # looks after everybody's objects
    ADMIN = 5  # the daemon itself, too

    @property
    def word(self) -> str:
        """As it is written."""
        return self.name.lower()

    @classmethod
    def of(cls, word: str) -> Role:
        """The role of that word."""
        return cls[word.upper()]


class Rights(NamedTuple):
    """The rights of one client, or of several that are alike."""

    role: Role
    all: bool = False  # there is no policy: nothing needs to be asked
    rule: str = ""  # its name, for log and audit; never told to the client
    commands: frozenset[str] | None = None  # None: all
    types: frozenset[str] | None = None  # qom-types of object-add; None: all
    paths: tuple[str, ...] | None = None  # the directories below which it may have files opened; None: anywhere
    limits: Mapping[str, int] = _NONE  # by the names of policy.json
    room: str | None = None  # whose objects are all that it sees: a uid, or a made room; None: it sees everybody's
    account: str = ""  # what is used is charged to: "uid:UID", "rule:NAME", "namespace:NAME" or "room:ROOM"

    @property
    def sees_all(self) -> bool:
        """Whether it sees what everybody has."""
        return self.room is None

    def may(self, command: str) -> bool:
        """Whether a command may be used."""
        return self.commands is None or command in self.commands

    def check_command(self, command: str) -> None:
        """Raise QmpError if a command may not be used."""
        if not self.may(command):
            raise QmpError(f"Command {command} disabled by policy", COMMAND_NOT_FOUND)

    def check_type(self, qom_type: str) -> None:
        """Raise QmpError if objects of a type may not be created."""
        if self.types is not None and qom_type not in self.types:
            raise QmpError(f"type '{qom_type}' is disabled by policy")

    def root_of(self, path: str) -> str:
        """The directory below which a file must be, to be opened for the client; "": anywhere. QmpError if it may not.

        Judged by its name, nothing is looked up: open it with `kernel.beneath.Paths`.
        """
        if self.paths is None:
            return ""
        for root in self.paths:
            if _below(os.path.normpath(path), root):
                return root
        raise QmpError(f"path '{path}' is disabled by policy")


def _below(path: str, root: str) -> bool:
    return os.path.isabs(path) and os.path.commonpath((path, root)) == root


ALL: Final = Rights(Role.ADMIN, all=True)
OBSERVER: Final = Rights(Role.OBSERVER, all=True)  # of HTTP, which can do nothing but read, where there is no policy

"""Who is let in, and with which rights: by the policy, or without one by the socket's own permissions."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from gmemd.authority.peer import Peer, peer_groups
from gmemd.authority.rights import ALL, OBSERVER, Rights, Role
from gmemd.errors import QmpError

if TYPE_CHECKING:
    import socket

    from gmemd.authority.policy import Policy
    from gmemd.schema.validate import Schema


class Gate:
    """The one place where clients get their rights."""

    def __init__(self, path: str, schema: Schema) -> None:
        """`path` is that of the policy, "" for none; QmpError if it cannot be used."""
        self._path = path
        self._schema = schema
        self.policy: Policy | None = None
        if path:
            self.load(self.read())

    @property
    def words(self) -> str:
        """Who is let in, for the log."""
        if self.policy is None:
            return "no policy: root, gmemd's own user and the group of its socket may do everything"
        return f"policy '{self._path}' with {len(self.policy.rules)} rules"

    def read(self) -> Policy:
        """The policy of the file, which is not in force yet; blocks; QmpError if any of it is wrong."""
        from gmemd.authority.reading import read_policy  # with the validator, which nobody else needs at start

        return read_policy(self._path, self._schema)

    def load(self, policy: Policy) -> None:
        """Put a policy into force."""
        self.policy = policy

    def admit(self, sock: socket.socket, path: str) -> tuple[Peer, Rights]:
        """Who a new client of the listening socket at `path` is, and its rights; QmpError if it is not let in."""
        if self.policy is not None:
            peer = Peer.examined(sock)
            return peer, self.policy.rights_of(peer)
        peer = Peer.connected(sock)
        if peer.uid not in (0, os.geteuid()) and _group(path) not in peer_groups(sock) | {peer.gid}:
            raise QmpError("without a policy only root, gmemd's own user and the group of its socket are let in")
        return peer, ALL

    def rights_in(self, room: str, namespace: str) -> Rights:
        """The rights of whoever connects to a made room's socket; QmpError if the policy gives none."""
        if self.policy is None:
            return of_a_member(room, self._schema)
        return self.policy.rights_in(room, namespace)

    def again(self, peer: Peer) -> Rights:
        """The rights of a client that was let in under an earlier policy; QmpError if it has none any more."""
        return ALL if self.policy is None else self.policy.rights_of(peer)

    def admit_http(self, sock: socket.socket | None) -> Rights:
        """The rights of a client of HTTP, None: by TCP; QmpError if it has none. Without a policy it sees all."""
        if self.policy is None:
            return OBSERVER
        if sock is None:
            return self.policy.rights_of(None)
        return self.policy.rights_of(Peer.examined(sock))


def of_a_member(room: str, schema: Schema) -> Rights:
    """The rights of the clients of a made room where there is no policy."""
    commands = frozenset(name for name, command in schema.commands.items() if Role.of(command.role) <= Role.MEMBER)
    return Rights(Role.MEMBER, commands=commands, paths=(), room=room, account=f"room:{room}")


def _group(path: str) -> int | None:
    """The group that may open a socket; None if it has none."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        if stat.S_ISSOCK(status.st_mode) and status.st_mode & stat.S_IWGRP:
            return status.st_gid
    return None

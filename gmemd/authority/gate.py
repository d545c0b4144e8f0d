"""Who is let in, and with which rights: by the policy, or without one by the socket's own permissions."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from gmemd.authority.peer import Peer, peer_groups
from gmemd.authority.rights import ALL, Rights
from gmemd.errors import QmpError

if TYPE_CHECKING:
    import socket

    from gmemd.authority.policy import Policy


class Gate:
    """The one place where clients get their rights."""

    def __init__(self, policy: Policy | None = None) -> None:
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


def _group(path: str) -> int | None:
    """The group that may open a socket; None if it has none."""
    with contextlib.suppress(OSError, ValueError):
        status = os.stat(path)
        if stat.S_ISSOCK(status.st_mode) and status.st_mode & stat.S_IWGRP:
            return status.st_gid
    return None

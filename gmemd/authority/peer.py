"""Who is at the other end of a connection, found out once, when it is accepted.

What the kernel says is as it was when the client connected: a process that gives up its rights or hands the connection
on later is still who it was. The process id may be reused as soon as the process has ended, so what is read from /proc
counts only if a pidfd, taken from the connection, says afterwards that the process lives (unix(7), pidfd_open(2)).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
from typing import Final, NamedTuple

from gmemd.errors import QmpError
from gmemd.processes.identity import PROC, cgroup_of, read, system_unit

_ucred: Final = struct.Struct("iII")  # pid, uid, gid
_PEERPIDFD: Final = 77  # SO_PEERPIDFD, since Linux 6.5
_PEERGROUPS: Final = 59  # SO_PEERGROUPS
_pidfd_info: Final = struct.Struct("QQIIII32x")  # mask, cgroupid, pid, tgid, ppid, ruid: struct pidfd_info
_GET_INFO: Final = 0xC040FF0B  # PIDFD_GET_INFO
_INFO_CREDS: Final = 2
_OVERFLOW: Final = 65534  # what stands for a user of another namespace that has no number in ours


class Peer(NamedTuple):
    """One client: effective ids and groups when it connected, real uid, control group and unit when it was accepted."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()  # with gid
    ruid: int | None = None  # None: not known
    cgroup: str = ""
    unit: str = ""  # the system's unit, not one that a user's own manager has
    label: str = ""  # of the security module

    @classmethod
    def connected(cls, sock: socket.socket) -> Peer:
        """The ids alone."""
        return cls(*_ucred.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)))

    @classmethod
    def examined(cls, sock: socket.socket) -> Peer:
        """All of it; QmpError if there is no telling who it is."""
        peer = cls.connected(sock)
        if peer.uid == _OVERFLOW:
            raise QmpError("its user has no number here: it is of another user namespace")
        pidfd = _pidfd(sock)
        try:
            place = f"{PROC}/{peer.pid}"
            cgroup = cgroup_of(place) or ""
            ruid = _real_uid(pidfd, place)
            if not _lives(pidfd):
                raise QmpError("the process that connected has ended")
        finally:
            os.close(pidfd)
        return peer._replace(groups=peer_groups(sock) | {peer.gid}, ruid=ruid, cgroup=cgroup,
                             unit=system_unit(cgroup) or "", label=_label(sock))


def peer_groups(sock: socket.socket) -> frozenset[int]:
    """The supplementary groups that a client had when it connected; QmpError if they are more than can be read."""
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _PEERGROUPS, 1024)  # the most that Python reads
    except OSError as exc:
        raise QmpError("it is in more than 256 groups") from exc
    return frozenset(struct.unpack(f"{len(data) // 4}I", data))


def _pidfd(sock: socket.socket) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _PEERPIDFD)
    except OSError as exc:  # a process that has ended, before Linux 6.16
        raise QmpError("the process that connected has ended") from exc


def _lives(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def _real_uid(pidfd: int, place: str) -> int | None:
    info = bytearray(_pidfd_info.size)
    _pidfd_info.pack_into(info, 0, _INFO_CREDS, *[0] * 5)
    try:
        fcntl.ioctl(pidfd, _GET_INFO, info)
        mask, *_, ruid = _pidfd_info.unpack(info)
        if mask & _INFO_CREDS:
            return int(ruid)
    except OSError:  # before Linux 6.13, or it is of another pid namespace
        pass
    try:
        lines = read(f"{place}/status").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("Uid:")), None)


def _label(sock: socket.socket) -> str:
    try:
        label = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERSEC, 1024)
    except OSError:  # there is no security module that labels
        return ""
    return label.rstrip(b"\0").decode("ascii", "backslashreplace")

"""The process of cooperating.py, as its test sees it."""

from __future__ import annotations

import array
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest

from tests.commands.live import LiveMachine
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
SIGBUS_FEATURE = 1 << 7  # UFFD_FEATURE_SIGBUS


class Guest:
    """The other process; `uffd` came from it, and belongs to the caller."""

    def __init__(self, object_fd: int, size: int, features: int = SIGBUS_FEATURE) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(PATIENCE)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.commands.cooperating", str(object_fd), str(size), str(theirs.fileno()),
                 str(features)], pass_fds=(object_fd, theirs.fileno()), cwd=ROOT)
        data, ancillary, _, _ = self._ours.recvmsg(100, 100)
        if not data:
            self.process.wait()
            pytest.skip("needs leave to make a userfaultfd")
        self.address = int(data)
        fds = array.array("i")
        fds.frombytes(ancillary[0][2])
        self.uffd = fds[0]

    def ask(self, verb: str, offset: int) -> str:
        """What it answers; "" if it ended."""
        try:
            self._ours.sendall(f"{verb} {offset}\n".encode())
            return self._ours.recv(100).decode().rstrip("\n")
        except ConnectionError:
            return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self.process.kill()
        self.process.wait()


async def hand_over(machine: LiveMachine, guest: Guest) -> None:
    """Send the userfaultfd by getfd, as the process itself would: its name is `u`."""
    machine.sent, machine.pid = [guest.uffd], guest.process.pid
    await machine.do("getfd", fdname="u")

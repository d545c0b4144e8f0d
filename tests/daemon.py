"""Real servers for tests: a gmemd of this tree, or another QMP server, on a socket in a private directory.

    with Daemon() as daemon, daemon.client() as client:
        client.execute("query-version")

A server is ready when a connection gets its greeting.
Leaving the `with` ends it by SIGTERM; a gmemd must then end with status 0 and without a traceback in its log.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gmemd.client.running import Running
from tests.patience import PATIENCE


class Server(Running):
    """One child process that speaks QMP on `sock`, scratch files in `dir`."""

    pause = 0.005

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any) -> None:
        """Start `argv`, its environment added to ours; the rest is as in Running."""
        super().__init__(argv, env={**os.environ, **(env or {})}, **options)
        self.pid = self.process.pid

    @property
    def dir(self) -> Path:
        return self.directory

    @property
    def sock(self) -> Path:
        return Path(self.socket)

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        """Give a socket to the server (not connected if the server does not listen), greeting unread."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        with suppress(OSError):
            sock.connect(str(self.sock))
        return sock

    def _greets(self) -> bool:
        with self.connect() as sock, suppress(OSError):
            return bool(sock.recv(1))
        return False

    def open_fds(self) -> int:
        """Count the descriptors that the server holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settled_fds(self, most: int) -> int:
        """Count them once no more than `most` are left, or after a while: what clients left is closed soon."""
        end = time.monotonic() + PATIENCE
        while (count := self.open_fds()) > most and time.monotonic() < end:
            time.sleep(0.001)
        return count

    def wait(self) -> int:
        """Wait until the server has ended by itself; give its exit status."""
        return self.process.wait(PATIENCE)

    def __exit__(self, kind: type[BaseException] | None, _exc: BaseException | None,
                 _trace: TracebackType | None) -> None:
        alive = self.process.poll() is None
        try:
            status = self.stop()
            if kind is None:
                self.check_end(status if alive else 0)
        finally:
            self.remove()

    def check_end(self, status: int) -> None:
        """Assert that the server has ended as it should (`status` 0 also when the test itself ended it)."""


class Daemon(Server):
    """A gmemd of this tree. `arguments` go onto its command line behind socket, persistence and kernel."""

    def __init__(self, *arguments: str, kernel: str = "auto", persist: str = "off", monitor: str = "",
                 env: Mapping[str, str] | None = None, measured: bool = True, prefix: Sequence[str] = (),
                 **options: Any) -> None:
        """`monitor`: options of the monitor, as ",pretty=on". `measured`: under coverage, if the tests are.

        `prefix` is what starts it.
        """
        if not measured:
            env = {**(env or {}), "COVERAGE_PROCESS_CONFIG": ""}
        super().__init__(
            [*prefix, sys.executable, "-m", "gmemd", "--qmp", "{address}" + monitor, "--persist", persist,
             "--kernel", kernel, "--state-dir", "{directory}/state",
             "--snapshots", "{directory}/snapshots", *arguments],
            env=env, **options)

    def check_end(self, status: int) -> None:
        log = self.log()
        assert "Traceback" not in log, log
        assert status == 0, log

"""Real servers for tests: a gmemd of this tree, or another QMP server, on a socket in a private directory.

    with Daemon() as daemon, daemon.client() as client:
        client.execute("query-version")

A server is ready when a connection gets its greeting.
Leaving the `with` ends it by SIGTERM; a gmemd must then end with status 0 and without a traceback in its log.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tests.patience import PATIENCE

if TYPE_CHECKING:
    from gmemd.client.client import Client



class Server:
    """One child process that speaks QMP on `sock`, its log in `log`, scratch files in `dir`."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None,
                 pass_fds: Sequence[int] = (), stderr: int | None = None) -> None:
        """Start `argv`; "{sock}" and "{dir}" in it are filled in. Standard error goes to `log`, too, or to an fd."""
        self.dir = Path(tempfile.mkdtemp(prefix="gmemd-"))
        self.sock = self.dir / "qmp.sock"
        self.log = self.dir / "log"
        filled = [word.replace("{sock}", str(self.sock)).replace("{dir}", str(self.dir)) for word in argv]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                filled, stdin=subprocess.DEVNULL, stdout=log, stderr=log if stderr is None else stderr,
                pass_fds=pass_fds,
                env=None if env is None else {**os.environ, **env})
        self.pid = self.process.pid
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            self.remove()
            raise

    def _wait_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        while not self._greets():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server did not start: {self.log_text()}")
            time.sleep(0.005)

    def _greets(self) -> bool:
        with self.connect() as sock:
            try:
                return bool(sock.recv(1))
            except OSError:
                return False

    def connect(self, timeout: float = PATIENCE) -> socket.socket:
        """Give a socket to the server (not connected if the server does not listen), greeting unread."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        with suppress(OSError):
            sock.connect(str(self.sock))
        return sock

    def log_text(self) -> str:
        """Give what the server has written to its standard output and error."""
        return self.log.read_text(errors="replace")

    def open_fds(self) -> int:
        """Count the descriptors that the server holds."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def settled_fds(self, most: int) -> int:
        """Count them once no more than `most` are left, or after a while: what clients left is closed soon."""
        end = time.monotonic() + PATIENCE
        while (count := self.open_fds()) > most and time.monotonic() < end:
            time.sleep(0.001)
        return count

    def kill(self) -> None:
        """End the server by SIGKILL."""
        self.process.kill()
        self.process.wait()

    def wait(self) -> int:
        """Wait until the server has ended by itself; give its exit status."""
        return self.process.wait(PATIENCE)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End the server by a signal and give its exit status.

        One that has removed its socket is ending by itself, and is only waited for.
        """
        if self.process.poll() is None and self.sock.exists():
            self.process.send_signal(signal_number)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def remove(self) -> None:
        """Remove the private directory."""
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

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
                 env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = (),
                 measured: bool = True, stderr: int | None = None) -> None:
        """`monitor`: options of the monitor, as ",pretty=on". `measured`: under coverage, if the tests are."""
        if not measured:
            env = {**(env or {}), "COVERAGE_PROCESS_CONFIG": ""}
        super().__init__(
            [sys.executable, "-m", "gmemd", "--qmp", "unix:{sock}" + monitor, "--persist", persist,
             "--kernel", kernel, "--state-dir", "{dir}/state", *arguments],
            env=env, pass_fds=pass_fds, stderr=stderr)

    def client(self) -> Client:
        """Give a connected, negotiated client."""
        from gmemd.client.client import Client

        return Client(str(self.sock))

    def check_end(self, status: int) -> None:
        log = self.log_text()
        assert "Traceback" not in log, log
        assert status == 0, log

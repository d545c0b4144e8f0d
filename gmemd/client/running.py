"""A private gmemd, or another server that speaks QMP: starting it, waiting for it, killing and ending it.

    with RunningGmemd("--lab", keep=True) as gmemd, gmemd.client() as client:
        client.execute("query-status")
        gmemd.crash()
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
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gmemd.client.client import Client
from gmemd.posix.sockets import written

PATIENCE = 180.0  # seconds; for an overloaded machine: only what hangs is noticed this late
_PAUSE = 0.0005  # seconds between two checks


class Running:
    """A process that speaks QMP at the path `socket`, with its own directory; the `with` block ends it.

    Where it is a keeper, its child is "the daemon".
    """

    pause = _PAUSE  # between two looks for the greeting

    def __init__(self, command: Sequence[str], *, parent: str | None = None, **options: Any) -> None:
        """Start it and wait until it greets; ConnectionError with its log if it ends instead, or never greets.

        In the command "{directory}" is replaced, and "{socket}" by the path, "{address}" by it as --qmp takes it.
        `parent` is where the directory is made; `options` are Popen's.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="gmemd-", dir=parent))
        self.socket = str(self.directory / "qmp.sock")
        self.log_path = self.directory / "log"
        for name, text in (("{directory}", str(self.directory)), ("{socket}", self.socket),
                           ("{address}", written(self.socket))):
            command = [word.replace(name, text) for word in command]
        with ExitStack() as unwind:
            unwind.callback(self.remove)
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(command, **{"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log,
                                                            **options})
            unwind.callback(self._kill)
            self.wait_greeting()
            unwind.pop_all()

    def wait_greeting(self) -> None:
        """Wait until a client is greeted; ConnectionError with the log if the process has ended."""
        end = time.monotonic() + PATIENCE
        while not self._greets():
            if self.process.poll() is not None or time.monotonic() > end:
                raise ConnectionError(f"the server does not answer: {self.log()}")
            time.sleep(self.pause)

    def _greets(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer, suppress(OSError):
            peer.settimeout(PATIENCE)
            peer.connect(self.socket)
            return bool(peer.recv(1 << 16))
        return False

    def client(self, **options: Any) -> Client:
        """A new client, negotiated."""
        return Client(self.socket, **options)

    def log(self) -> str:
        """Its standard output and error so far."""
        return self.log_path.read_text(errors="replace")

    def daemon(self) -> int:
        """The process id of the daemon under this keeper, once there is one; ConnectionError if none starts."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            for child in children(self.process.pid):
                if state(child) not in "ZX":
                    return child
            time.sleep(_PAUSE)
        raise ConnectionError(f"the keeper has no daemon: {self.log()}")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the daemon under this keeper a signal and wait until it has ended; its process id."""
        daemon = self.daemon()
        os.kill(daemon, number)
        self._wait_end(daemon)
        return daemon

    def _wait_end(self, pid: int) -> None:
        end = time.monotonic() + PATIENCE
        while state(pid) not in "ZX":
            if time.monotonic() > end:
                raise TimeoutError(f"process {pid} does not end: {self.log()}")
            time.sleep(_PAUSE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status.

        TimeoutExpired if only SIGKILL ends it. One that has removed its socket is ending by itself, and is only waited
        for.
        """
        if self.process.poll() is None and os.path.exists(self.socket):
            self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._kill()
            raise

    def _kill(self) -> None:
        """End it and, where it is a keeper, the daemon too, which would go on without it."""
        under = children(self.process.pid) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for child in under:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            self._wait_end(child)

    def remove(self) -> None:
        """Remove its directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        """End it and remove its directory."""
        try:
            self.stop()
        finally:
            self.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class RunningGmemd(Running):
    """A gmemd of this Python's packages, by default with the simulated kernel, which is the same on every host."""

    def __init__(self, *arguments: str, kernel: str = "simulated", keep: bool = False, **options: Any) -> None:
        """With `keep`, under the keeper.  `arguments` go onto the daemon's command line, `options` are Running's."""
        self._kept = keep
        super().__init__([sys.executable, "-m", "gmemd", *(["--keeper"] if keep else []), "--qmp", "{address}",
                          "--kernel", kernel, "--persist", "on" if keep else "off", "--state-dir", "{directory}",
                          "--snapshots", "{directory}/snapshots",
                          *arguments], **options)

    def crash(self) -> None:
        """Kill the daemon under its keeper (SIGKILL), and wait until the next one answers."""
        if not self._kept:
            raise ValueError("crash() needs a keeper, which restarts the daemon: keep=True")
        self.kill()
        self.wait_greeting()


def children(pid: int) -> list[int]:
    """The child processes of a process (of its main thread)."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """The state of a process as ps(1) shows it, "X" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"

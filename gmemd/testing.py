"""A gmemd for other people's tests: a daemon on a socket of its own, with the kernel that the test wants.

    pytest_plugins = ["gmemd.testing"]

    def test_my_vmm(gmemd):
        with gmemd.client() as qmp:
            qmp.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram", "size": 1 << 20})

    @pytest.mark.gmemd(kernel="simulated:6.17")
    def test_without_mmap(gmemd): ...

The default is the simulated kernel, so that a test means the same on every host.  With `keep=True` the daemon runs
under the keeper: `crash()` then kills it, and its objects come back.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from gmemd.client.client import Client
from gmemd.posix.sockets import written

START_SECONDS = 30.0  # a loaded machine
STOP_SECONDS = 20.0


class RunningGmemd:
    """A gmemd process with a directory of its own; ends with the `with` block."""

    def __init__(self, *arguments: str, kernel: str = "simulated", keep: bool = False) -> None:
        """Start it and wait until it answers; AssertionError with its log when it does not."""
        self.directory = Path(tempfile.mkdtemp(prefix="gmemd-test-"))
        self.socket = str(self.directory / "qmp.sock")
        self._log = self.directory / "log"
        command: Sequence[str] = [sys.executable, "-m", "gmemd", *(["--keeper"] if keep else []),
                                  "--qmp", written(self.socket), "--kernel", kernel,
                                  "--persist", "on" if keep else "off", *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.wait_answers()
        except BaseException:
            self.stop()
            raise

    def wait_answers(self) -> None:
        """Wait until a client is answered."""
        end = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), self.client(timeout=START_SECONDS) as qmp:
                qmp.execute("query-status")
                return
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"gmemd does not answer: {self.log()}")
            time.sleep(0.01)

    def client(self, **options: Any) -> Client:
        """A new client, negotiated."""
        return Client(self.socket, **options)

    def log(self) -> str:
        """What gmemd has logged so far."""
        return self._log.read_text(errors="replace")

    def crash(self) -> None:
        """Kill the daemon (SIGKILL) under its keeper, and wait until the next one answers."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
            with suppress(OSError):  # gone at once, or a zombie until the keeper has seen it
                while Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    time.sleep(0.001)
        self.wait_answers()

    def stop(self) -> None:
        """End it by SIGTERM, and remove its directory."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line("markers", "gmemd(*arguments, kernel=..., keep=...): how the fixture gmemd is started")


@pytest.fixture
def gmemd(request: pytest.FixtureRequest) -> Iterator[RunningGmemd]:
    """A running gmemd, as the marker `gmemd` asks for it."""
    marker = request.node.get_closest_marker("gmemd")
    arguments, options = (marker.args, marker.kwargs) if marker else ((), {})
    with RunningGmemd(*arguments, **options) as running:
        yield running

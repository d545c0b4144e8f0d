"""podman with storage and mounts of its own, as the tests use it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 300.0  # seconds; the build of the image installs packages

_PROGRAMS = ("podman", "crun", "unshare", "nsenter", "dpkg-query", "apt-cache")
_WHEELS = Path("/usr/share/python-wheels")  # of Debian, with pip, for the base image
_STORAGE = """[storage]
driver = "overlay"
graphroot = "{0}/graph"
runroot = "{0}/run"
"""


def missing() -> str:
    """Return what these tests need and this machine has not; "" if it has all."""
    if os.getuid() != 0:
        return "root"
    for program in _PROGRAMS:
        if not shutil.which(program):
            return f"{program} (script/packages installs it)"
    return "" if _WHEELS.exists() else f"{_WHEELS} (script/packages installs it)"


class Podman:
    """Runs podman, and other programs that call it, where images and containers of nobody else are."""

    def __init__(self, directory: Path, holder: int) -> None:
        """`holder` is a process in whose mount namespace everything happens."""
        self.directory = directory
        self._enter = ["nsenter", f"--mount=/proc/{holder}/ns/mnt", "--"]
        self._environ = {**os.environ, "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
                         "CONTAINERS_CONF": str(HERE / "containers.conf"), "TMPDIR": str(directory)}

    def command(self, *words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; `status` is what it must end with, None: whatever."""
        done = subprocess.run([*self._enter, *words], env=self._environ, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if status is not None:
            assert done.returncode == status, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def __call__(self, *words: str | Path) -> str:
        """Run a podman command; give its output."""
        return self.command("podman", *words).stdout.strip()


@contextlib.contextmanager
def private_podman() -> Iterator[Podman]:
    """Give a podman with empty storage; all it made goes at the end."""
    with tempfile.TemporaryDirectory(prefix="gmemd-podman-", ignore_cleanup_errors=True) as directory:
        path = Path(directory)
        (path / "storage.conf").write_text(_STORAGE.format(directory))
        # it says so when its mounts are made, and ends when its standard input is closed
        with subprocess.Popen([HERE / "cgroup2.sh", "sh", "-c", "echo ready; exec cat"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            podman = Podman(path, holder.pid)
            try:
                yield podman
            finally:
                podman.command("podman", "rm", "--all", "--force", "--time", "0", status=None)
                podman.command("umount", "-R", path / "graph" / "overlay", status=None)
                holder.send_signal(signal.SIGTERM)

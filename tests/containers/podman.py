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
    """Runs podman, and other programs that call it, with images and containers of its own."""

    def __init__(self, directory: Path, holder: int) -> None:
        """`holder` is a process in whose mount namespace everything happens, and where `directory` is."""
        self.directory = directory
        self._root = f"/proc/{holder}/root"
        self.enter = ["nsenter", f"--mount=/proc/{holder}/ns/mnt", "--"]
        self._environ = {**os.environ, "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
                         "CONTAINERS_CONF": str(HERE / "containers.conf"), "TMPDIR": str(directory)}

    def seen_from_here(self, path: str | Path) -> str:
        """Return the path of a file in that namespace for processes in this one."""
        return f"{self._root}{path}"

    def command(self, *words: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; `status` is what it must end with, None: whatever."""
        done = subprocess.run([*self.enter, *words], env=self._environ, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if status is not None:
            assert done.returncode == status, f"{words}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def write(self, name: str, text: str) -> Path:
        """Write a file into the directory; give its path."""
        Path(self.seen_from_here(self.directory / name)).write_text(text)
        return self.directory / name

    def __call__(self, *words: str | Path) -> str:
        """Run a podman command; give its output."""
        return self.command("podman", *words).stdout.strip()


@contextlib.contextmanager
def private_podman() -> Iterator[Podman]:
    """Give a podman with empty storage; all it made goes at the end."""
    with tempfile.TemporaryDirectory(prefix="gmemd-podman-", ignore_cleanup_errors=True) as directory:
        # Storage is a tmpfs, which goes with the namespace; the holder says when it is there, and ends with its input.
        hold = ["sh", "-c", 'mount -t tmpfs tmpfs "$0" && echo ready && exec cat', directory]
        with subprocess.Popen([HERE / "cgroup2.sh", *hold], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            podman = Podman(Path(directory), holder.pid)
            podman.write("storage.conf", _STORAGE.format(directory))
            try:
                yield podman
            finally:
                podman.command("podman", "rm", "--all", "--force", "--time", "0", status=None)
                holder.send_signal(signal.SIGTERM)

"""An etcd for tests: a process of its own, which goes with its data."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile


def why_not() -> str:
    """Why there is none here; "" if there is."""
    return "" if shutil.which("etcd") else "needs etcd (Debian package etcd-server)"


class Etcd:
    """An etcd, spoken to by its JSON gateway at `url`."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # it waits for the disk at every write
        self._directory = tempfile.mkdtemp(prefix="gmemd-etcd-", dir=memory)
        peers = f"http://127.0.0.1:{_free_port()}"
        self.url = f"http://127.0.0.1:{_free_port()}"
        self._process = subprocess.Popen(
            ["etcd", "--data-dir", self._directory, "--listen-client-urls", self.url, "--advertise-client-urls",
             self.url, "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster",
             f"default={peers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

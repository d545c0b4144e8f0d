"""A kept daemon to be tested: what it holds, what its keeper holds, and what its objects contain."""

from __future__ import annotations

import array
import json
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gmemd.client.client import Client
from tests.patience import PATIENCE
from tests.robustness.tracer import Outcome, Tracer

HOLD = "GMEMD_TEST_HOLD"  # names a file: while it is there a new warm daemon stops itself before it begins
NEXT = "GMEMD_TEST_NEXT"  # names a file: while it is there a new warm daemon knows one more version of the registry
ROOT = Path(__file__).parents[2]

Request = tuple[str, dict[str, Any]]


class Wrong(AssertionError):
    """What was promised does not hold."""


class Link:
    """A raw negotiated connection: requests go out at one time, replies are counted without waiting."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(path)
        self._buffer = b""
        self.replies: list[dict[str, Any]] = []
        self.closed = False  # by the daemon
        self._read_one()
        self._socket.sendall(b'{"execute":"qmp_capabilities"}\n')
        self._read_one()
        self.replies.clear()

    def send(self, requests: list[Request], fds: list[int] | None = None) -> None:
        """Send all requests in one message, with fds."""
        text = "".join(json.dumps({"execute": name, "arguments": arguments}) + "\n" for name, arguments in requests)
        self._socket.sendmsg([text.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                             if fds else [])

    def poll(self) -> None:
        """Take what has come, without waiting; events are dropped, fds closed."""
        self._socket.settimeout(0)
        try:
            while not self.closed:
                self._read_one()
        except BlockingIOError:
            return
        finally:
            self._socket.settimeout(PATIENCE)

    def wait(self, count: int) -> None:
        """Wait until so many replies are there, or the daemon has closed."""
        while len(self.replies) < count and not self.closed:
            self._read_one()

    def _read_one(self) -> None:
        try:
            data, ancillary, _, _ = self._socket.recvmsg(1 << 18, 4096, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, ancillary = b"", []
        self._take(data, ancillary)

    def _take(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> None:
        for _, _, rights in ancillary:
            for fd in array.array("i", rights):
                os.close(fd)
        self.closed = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.replies += [reply for line in lines if "event" not in (reply := json.loads(line))]

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class State:
    """All that a client can see of a daemon."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)  # query-memdev by id
    contents: dict[str, int] = field(default_factory=dict)  # CRC-32 by id
    inodes: dict[str, int] = field(default_factory=dict)  # by id
    ranges: dict[str, Any] = field(default_factory=dict)  # query-memdev-ranges by id
    fdsets: list[Any] = field(default_factory=list)
    unclaimed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def of(self, object_id: str) -> tuple[Any, ...] | None:
        """Everything about one object that must outlive the daemon; None: it is not there."""
        if object_id not in self.objects:
            return None
        return self.objects[object_id], self.contents[object_id], self.ranges.get(object_id)


class World:
    """A keeper, its daemon, and a directory of their own; ends with the `with` block."""

    def __init__(self, *arguments: str, warm: bool = True, kernel: str = "simulated", keeper: tuple[str, ...] = (),
                 persist: str = "on") -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="gmemd-robust-"))
        self.socket = str(self.directory / "qmp.sock")
        self.log_path = self.directory / "log"
        self.state_dir = self.directory / "state"
        self.hold = self.directory / "hold"
        self.next = self.directory / "next"
        self.files = self.directory / "files"  # of objects that are files
        self.files.mkdir()
        words = ["-m", "tests.robustness.warm"] if warm else ["-m", "gmemd", "--keeper"]
        options = ["--listen", f"qmp={self.socket}", "--restart-delay", "0.001", *keeper]
        daemon = ["--kernel", kernel, "--persist", persist, "--state-dir", str(self.state_dir),
                  "--log-level", "warning", *arguments]
        command = [sys.executable, *words, *options, *(["--exec", "gmemd", *daemon] if warm else ["--", *daemon])]
        with self.log_path.open("wb") as log:
            self.keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                                           env={**os.environ, HOLD: str(self.hold), NEXT: str(self.next)})
        try:
            self.wait_listening()
            with self.client():
                pass
        except BaseException:
            self.close()
            raise

    # -- processes -------------------------------------------------------------------------------------------

    def wait_listening(self) -> None:
        """Wait until the keeper listens; the daemon may still be on its way."""
        end = time.monotonic() + PATIENCE
        while not os.path.exists(self.socket):
            if self.keeper.poll() is not None or time.monotonic() > end:
                raise Wrong(f"no keeper: {self.log()}")
            time.sleep(0.005)

    def pid(self) -> int:
        """The living daemon's process id."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.keeper.poll() is None:
            for child in Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split():
                with suppress(OSError):
                    if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                        return int(child)
            time.sleep(0.001)
        raise Wrong(f"no daemon: {self.log()}")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Send the daemon a signal, wait until that process is gone; its pid."""
        pid = self.pid()
        os.kill(pid, number)
        self.wait_gone(pid)
        return pid

    @contextmanager
    def held(self, number: int = signal.SIGKILL) -> Iterator[int]:
        """Between a kill and the next start (of a warm daemon), whose process stands still meanwhile; its pid."""
        self.hold.touch()
        self.kill(number)
        yield self.wait_held()
        self.hold.unlink()
        os.kill(self.pid(), signal.SIGCONT)

    def wait_held(self) -> int:
        """Wait until a new daemon has stopped itself; its pid."""
        end = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError):
                pid = self.pid()
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                    return pid
            if time.monotonic() > end:
                raise Wrong(f"no daemon is held: {self.log()}")
            time.sleep(0.001)

    def wait_log(self, words: str, count: int = 1) -> None:
        """Wait until keeper or daemon have said something so often."""
        end = time.monotonic() + PATIENCE
        while self.log().count(words) < count:
            if time.monotonic() > end:
                raise Wrong(f"not {count} times '{words}': {self.log()}")
            time.sleep(0.005)

    def wait_gone(self, pid: int) -> None:
        """Wait until the keeper has reaped a process."""
        end = time.monotonic() + PATIENCE
        while os.path.exists(f"/proc/{pid}"):
            if time.monotonic() > end:
                raise Wrong(f"process {pid} does not end: {self.log()}")
            time.sleep(0.001)

    def client(self) -> Client:
        """A client; waits for a daemon that is being started."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return Client(self.socket, timeout=PATIENCE)
            except (ConnectionError, FileNotFoundError):  # it went to a daemon that was about to die
                if time.monotonic() > end or self.keeper.poll() is not None:
                    raise Wrong(f"nobody answers: {self.log()}") from None

    def trace(self, link: Link, requests: list[Request], fds: list[int] | None = None, *, at: int,
              error: int = 0, may: Callable[[str], bool] = lambda _: True) -> Outcome:
        """Have requests carried out, and strike at the `at`-th system call of it."""
        before = len(link.replies)

        def ended() -> bool:
            link.poll()
            return link.closed or len(link.replies) - before == len(requests)

        outcome = Tracer(self.pid(), at=at, error=error, may=may).run(lambda: link.send(requests, fds), ended)
        link.poll()
        return outcome

    # -- what there is ---------------------------------------------------------------------------------------

    def opened(self) -> int:
        """How many descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.pid()}/fd"))

    def memory(self) -> tuple[list[str], list[str]]:
        """Inode and name of each descriptor of memory that the keeper has open, and that the daemon has."""
        return self._memory(self.keeper.pid), self._memory(self.pid())

    def _memory(self, pid: int) -> list[str]:
        found = []
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                target, status = os.readlink(f"/proc/{pid}/fd/{fd}"), os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(status.st_mode) and target.startswith(("/memfd:", "anon_inode:", str(self.files))):
                    found.append(f"{status.st_ino} {target}")
        return sorted(found)

    def damaged(self) -> list[str]:
        """Registries that were put aside."""
        return sorted(name for name in os.listdir(self.state_dir) if "damaged" in name)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    # -- end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End keeper and daemon; the directory goes."""
        if self.keeper.poll() is None:
            with suppress(FileNotFoundError):
                self.hold.unlink()
            for child in Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split():
                with suppress(OSError):
                    os.kill(int(child), signal.SIGCONT)
            self.keeper.terminate()
            try:
                self.keeper.wait(20)
            except subprocess.TimeoutExpired:
                for child in Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children").read_text().split():
                    with suppress(OSError):
                        os.kill(int(child), signal.SIGKILL)
                self.keeper.kill()
                self.keeper.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def with_fd(client: Client, object_id: str) -> tuple[int, dict[str, Any]]:
    """An object's descriptor, now the caller's, and what it is."""
    info, [fd] = client.execute_fds("memdev-get-fd", {"id": object_id})
    return fd, info


def write_pattern(client: Client, object_id: str, seed: int = 0) -> None:
    """Fill an object with bytes that no other object has."""
    fd, info = with_fd(client, object_id)
    try:
        with mmap.mmap(fd, info["size"]) as memory:
            word = zlib.crc32(f"{object_id} {seed}".encode()).to_bytes(4, "little")
            memory[:] = word * (info["size"] // 4)
    finally:
        os.close(fd)


def checksum(client: Client, object_id: str, ranges: list[dict[str, Any]]) -> tuple[int, int]:
    """CRC-32 of an object's contents but for private ranges (-1: it is too short), and its inode."""
    fd, info = with_fd(client, object_id)
    try:
        status = os.fstat(fd)
        if status.st_size < info["size"]:
            return -1, status.st_ino  # to touch it would be SIGBUS
        with mmap.mmap(fd, info["size"], prot=mmap.PROT_READ) as memory:
            contents = bytearray(memory)
        for part in ranges:
            if part["visibility"] == "private":
                contents[part["offset"]:part["offset"] + part["size"]] = bytes(part["size"])
        return zlib.crc32(contents), status.st_ino
    finally:
        os.close(fd)


def look(client: Client) -> State:
    """All that can be seen."""
    objects = {entry["id"]: entry for entry in client.execute("query-memdev")}
    kinds = {entry["id"]: entry["kind"] for entry in client.execute("query-memdev-status")}
    ranges = {object_id: client.execute("query-memdev-ranges", {"id": object_id})
              for object_id, kind in kinds.items() if kind == "guest-memfd"}
    sums = {object_id: checksum(client, object_id, ranges[object_id]["ranges"] if object_id in ranges else [])
            for object_id in objects}
    return State(
        objects,
        {object_id: crc for object_id, (crc, _) in sums.items()},
        {object_id: inode for object_id, (_, inode) in sums.items()},
        ranges,
        client.execute("query-fdsets"),
        sorted(entry["name"] for entry in client.execute("query-memdev-unclaimed")),
        sorted(entry["id"] for entry in client.execute("query-memdev-lost")))

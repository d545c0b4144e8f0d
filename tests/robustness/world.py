"""A kept daemon to be tested: what it holds, what its keeper holds, and what its objects contain."""

from __future__ import annotations

import array
import json
import mmap
import os
import signal
import socket
import stat
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmemd.client.client import Client
from gmemd.client.running import Running, children, state
from tests.patience import PATIENCE, wait_for
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

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)  # query-memdev by id, and rooms, too
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


class World(Running):
    """A keeper, its daemon, and a directory of their own; ends with the `with` block."""

    def __init__(self, *arguments: str, warm: bool = True, kernel: str = "simulated", keeper: tuple[str, ...] = (),
                 persist: str = "on") -> None:
        words = ["-m", "tests.robustness.warm"] if warm else ["-m", "gmemd", "--keeper"]
        options = ["--listen", "qmp={socket}", "--restart-delay", "0.001", *keeper]
        daemon = ["--kernel", kernel, "--persist", persist, "--state-dir", "{directory}/state",
                  "--snapshots", "{directory}/snapshots",
                  "--log-level", "warning", *arguments]
        super().__init__(["env", f"{HOLD}={{directory}}/hold", f"{NEXT}={{directory}}/next", sys.executable, *words,
                          *options, *(["--exec", "gmemd", *daemon] if warm else ["--", *daemon])], cwd=ROOT)
        self.state_dir = self.directory / "state"
        self.hold = self.directory / "hold"
        self.next = self.directory / "next"
        self.files = self.directory / "files"  # of objects that are files
        self.files.mkdir()

    # -- processes -------------------------------------------------------------------------------------------

    @contextmanager
    def held(self, number: int = signal.SIGKILL) -> Iterator[int]:
        """Between a kill and the next start (of a warm daemon), whose process stands still meanwhile; its pid."""
        self.hold.touch()
        self.kill(number)
        yield self.wait_held()
        self.hold.unlink()
        os.kill(self.daemon(), signal.SIGCONT)

    def wait_held(self) -> int:
        """Wait until a new daemon has stopped itself; its pid."""
        wait_for(lambda: state(self.daemon()) == "T")
        return self.daemon()

    def wait_log(self, words: str, count: int = 1) -> None:
        """Wait until keeper or daemon have said something so often."""
        end = time.monotonic() + PATIENCE
        while self.log().count(words) < count:
            if time.monotonic() > end:
                raise Wrong(f"not {count} times '{words}': {self.log()}")
            time.sleep(0.005)

    def client(self) -> Client:
        """A client; waits for a daemon that is being started."""
        return super().client(timeout=PATIENCE, wait=PATIENCE)

    def trace(self, link: Link, requests: list[Request], fds: list[int] | None = None, *, at: int,
              error: int = 0, may: Callable[[str], bool] = lambda _: True) -> Outcome:
        """Have requests carried out, and strike at the `at`-th system call of it."""
        before = len(link.replies)

        def ended() -> bool:
            link.poll()
            return link.closed or len(link.replies) - before == len(requests)

        outcome = Tracer(self.daemon(), at=at, error=error, may=may).run(lambda: link.send(requests, fds), ended)
        link.poll()
        return outcome

    # -- what there is ---------------------------------------------------------------------------------------

    def opened(self) -> int:
        """How many descriptors the daemon has open."""
        return len(os.listdir(f"/proc/{self.daemon()}/fd"))

    def memory(self) -> tuple[list[str], list[str]]:
        """Inode and name of each descriptor of memory that the keeper has open, and that the daemon has."""
        return self._memory(self.process.pid), self._memory(self.daemon())

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

    # -- end -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End keeper and daemon; the directory goes."""
        if self.process.poll() is None:
            self.hold.unlink(missing_ok=True)
            for child in children(self.process.pid):
                with suppress(OSError):
                    os.kill(child, signal.SIGCONT)
        super().close()


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


def _open(row: dict[str, Any]) -> dict[str, Any]:
    """A row of query-memdev-rooms, with what a client of the room sees, instead of how many there are."""
    with Client(row["socket"], timeout=PATIENCE) as member:
        ids = sorted(entry["id"] for entry in member.execute("query-memdev"))
    return {**row, "clients": 0, "ids": ids}


def look(client: Client) -> State:
    """All that can be seen."""
    objects = {entry["id"]: entry for entry in client.execute("query-memdev")}
    kinds = {entry["id"]: entry["kind"] for entry in client.execute("query-memdev-status")}
    ranges = {object_id: client.execute("query-memdev-ranges", {"id": object_id})
              for object_id, kind in kinds.items() if kind == "guest-memfd"}
    sums = {object_id: checksum(client, object_id, ranges[object_id]["ranges"] if object_id in ranges else [])
            for object_id in objects}
    rooms = {row["id"]: _open(row) for row in client.execute("query-memdev-rooms")}
    return State(
        objects | rooms,
        dict.fromkeys(rooms, 0) | {object_id: crc for object_id, (crc, _) in sums.items()},
        {object_id: inode for object_id, (_, inode) in sums.items()},
        ranges,
        client.execute("query-fdsets"),
        sorted(entry["name"] for entry in client.execute("query-memdev-unclaimed")),
        sorted(entry["id"] for entry in client.execute("query-memdev-lost")))

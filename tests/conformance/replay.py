"""Carry one recorded case through a QMP server: the steps of the corpus, waiting no longer than needed.

The format of a case is described in README.md of this directory.
A step waits for as many lines as were recorded.
A line too many cannot hide: it comes first in the connection's next step, or before the answer to one more
command, sent behind the last step.
Only where nothing at all was recorded does silence have to be listened to.
"""

from __future__ import annotations

import os
import select
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.patience import PATIENCE

SILENCE = 0.05  # seconds to listen where nothing was recorded
ALL = sys.maxsize  # lines: to the end of file
NEGOTIATE = {
    "ready": b'{"execute":"qmp_capabilities"}\n',
    "ready-oob": b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}\n',
}
MODES = {"r": os.O_RDONLY, "rw": os.O_RDWR}
LAST = b'\x1b{"execute":"query-name","id":"last"}\n'  # ESC gives up a message half sent
CLEARED = "JSON parse error, stray '\\u001B'"

Case = dict[str, Any]
Step = dict[str, Any]


class Listener(Protocol):
    """What a replay needs of a server."""

    def connect(self) -> socket.socket: ...


@dataclass
class Result:
    """What came of one step: lines as text (undecodable bytes escaped), end of file, size of a file."""

    lines: list[str] = field(default_factory=list)
    closed: bool = False
    value: int | None = None


def recorded_lines(step: Step) -> list[Any]:
    """Unfold "recv" of a step: repeated and generated lines become what they stand for."""
    out: list[Any] = []
    for item in step.get("recv", []):
        if isinstance(item, dict) and "times" in item:
            out += [item["line"]] * item["times"]
        elif isinstance(item, dict) and "gen" in item:
            out.append("".join(text * times for text, times in item["gen"]))
        else:
            out.append(item)
    return out


class Connection:
    """One client, bytes to lines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.closed = False
        self._buffer = b""

    def send(self, data: bytes, fds: list[int]) -> None:
        """Send all, reading on, so that a big message cannot stall both sides; a closed peer is not an error."""
        view = memoryview(data)
        with suppress(OSError):
            if fds:
                view = view[socket.send_fds(self.sock, [view], fds):]
            while view and not self.closed:
                readable, writable, _ = select.select([self.sock], [self.sock], [], PATIENCE)
                if readable:
                    self._receive()
                if writable:
                    view = view[self.sock.send(view[:1 << 16]):]

    def read(self, want: int, wait: float = PATIENCE) -> list[str]:
        """Take the next lines: what is there once there are `want`, or `wait` seconds on, or at the end."""
        lines: list[str] = []
        end = time.monotonic() + (wait if want else SILENCE)
        while True:
            *whole, self._buffer = self._buffer.split(b"\n")
            lines += [_text(line) for line in whole]
            if self.closed and self._buffer:
                lines.append(_text(self._buffer))
            left = end - time.monotonic()
            if self.closed or left <= 0 or (want and len(lines) >= want):
                return lines
            if select.select([self.sock], [], [], left)[0]:
                self._receive()

    def _receive(self) -> None:
        try:
            data = self.sock.recv(1 << 20)
        except OSError:
            data = b""
        self.closed = not data
        self._buffer += data


def _text(line: bytes) -> str:
    """A line without its CR LF; a line that ends otherwise keeps a mark of it."""
    if not line.endswith(b"\r"):
        return line.decode("ascii", "backslashreplace") + "<LF without CR>"
    return line[:-1].decode("ascii", "backslashreplace")


class Replay:
    """One case on one server."""

    def __init__(self, server: Listener, case: Case) -> None:
        self._server = server
        self._case = case
        # @DIR@. Where a parse error follows a path, its column counts the path: ours is as long as the recorded.
        self._scratch = Path(tempfile.mkdtemp(prefix="qmpc.", dir="/tmp"))
        self._connections: dict[int, Connection] = {}
        self._fds: list[str] = []  # numbers returned by add-fd, for @FD0@, @FD1@, ...
        self._quiet: set[int] = set()  # connections that were silent last: they may hold half a message

    def run(self) -> list[Result]:
        """Do the whole case; give one result a step."""
        try:
            self._prepare()
            results = [self._step(step) for step in self._case["steps"]]
            self._finish(results)
            return results
        finally:
            for connection in self._connections.values():
                connection.sock.close()
            shutil.rmtree(self._scratch)

    def _prepare(self) -> None:
        start = self._case["start"]
        if start == "none":
            return
        connection = self._open(0)
        assert len(connection.read(1)) == 1, "no greeting"
        if start != "greeted":
            connection.send(NEGOTIATE[start], [])
            assert connection.read(1) == ['{"return": {}}'], "not negotiated"

    def _finish(self, results: list[Result]) -> None:
        """Add to the last result what the connections still had to say."""
        for number, connection in self._connections.items():
            if connection.closed or number in self._quiet:
                continue
            if self._case["setup"] == "pretty":  # an answer is not a single line there
                results[-1].lines += connection.read(0)
                continue
            connection.send(LAST, [])
            lines: list[str] = []
            while not (lines and '"id": "last"' in lines[-1]):
                lines += connection.read(1) or ['<no answer>, "id": "last"']
            ended = [] if lines[-1].startswith("{") else lines[-1:]
            results[-1].lines += [line for line in lines[:-1] if CLEARED not in line] + ended

    def _open(self, number: int) -> Connection:
        connection = self._connections[number] = Connection(self._server.connect())
        return connection

    def _step(self, step: Step) -> Result:
        do = step.get("do", "send")
        number = step.get("c", 0)
        if do == "open":
            self._open(number)
        elif do == "close":
            self._connections.pop(number).sock.close()
        elif do == "shut":
            with suppress(OSError):
                self._connections[number].sock.shutdown(socket.SHUT_WR)
        elif do in ("send", "read"):
            return self._exchange(step, number)
        else:
            return Result(value=self._file(do, self._scratch / step["name"], step))
        return Result()

    def _exchange(self, step: Step, number: int) -> Result:
        connection = self._connections[number]
        if step.get("do", "send") == "send":
            fds = [os.open(os.devnull, MODES[mode]) for mode in step.get("fds", ())]
            try:
                connection.send(self._payload(step), fds)
            finally:
                for fd in fds:
                    os.close(fd)
        want = ALL if step.get("closed") else len(recorded_lines(step))
        lines = connection.read(want, max(PATIENCE, step.get("wait", 0)))
        (self._quiet.discard if lines else self._quiet.add)(number)
        self._note_fds(lines)
        return Result([line.replace(str(self._scratch), "@DIR@") for line in lines], connection.closed)

    def _payload(self, step: Step) -> bytes:
        if "hex" in step:
            return bytes.fromhex(step["hex"])
        if "gen" in step:
            return "".join(text * times for text, times in step["gen"]).encode()
        text: str = step["text"].replace("@DIR@", str(self._scratch))
        for index, fd in enumerate(self._fds):
            text = text.replace(f"@FD{index}@", fd)
        return text.encode()

    def _note_fds(self, lines: list[str]) -> None:
        for line in lines:
            if line.startswith('{"return": {"fd": '):
                self._fds.append(line.removeprefix('{"return": {"fd": ').partition(",")[0])

    @staticmethod
    def _file(do: str, path: Path, step: Mapping[str, Any]) -> int | None:
        if do == "mkfile":
            path.write_bytes(b"x" * step.get("data", 0))
            os.truncate(path, step["size"])
        elif do == "fifo":
            os.mkfifo(path)
        elif do == "unblock":
            _meet_reader(path)
        elif do == "stat":
            return path.stat().st_size if path.exists() else None
        else:
            raise AssertionError(f"unknown step {do!r}")
        return None


def _meet_reader(path: Path) -> None:
    """Open a FIFO for writing as soon as somebody reads it (or after a while), and close it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with suppress(OSError):  # ENXIO: no reader yet
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return
        time.sleep(0.005)

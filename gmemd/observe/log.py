"""Log lines, cheap enough for one per command: a JSON object each, or on a terminal a readable line.

The objects are those of structlog's JSONRenderer: an event's own members, then `event`, `level`, `timestamp`. structlog
itself renders on a terminal only, because importing it takes 20 to 80 ms and up to 8 MiB. For the journal each line
begins with its priority (sd-daemon(3)).

Warnings and errors are written at once; other lines are buffered for up to FLUSH_SECONDS, once there is a loop to call
back later. The line of a command is assembled from prepared bytes, and gets a new timestamp once a millisecond.
Commands of one client beyond CLIENT_LINES a second are summed up in one line.

A slow reader of standard error holds up nobody: a thread writes, and what it cannot keep up with is counted
(posix/lines.py).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.posix.lines import Lines

LEVELS: Final = ("debug", "info", "warning", "error")
FLUSH_SECONDS: Final = 0.05
FLUSH_LINES: Final = 256
CLIENT_LINES: Final = 1000
TEXT_MAX: Final = 200  # characters of a client's text that a line repeats
_PRIORITIES: Final = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}
_STAMP_SECONDS: Final = 0.001

Write = Callable[[bytes], None]
Render = Callable[[dict[str, Any]], str]


class Log:
    """A log; `write` takes whole lines. Once `call_later` is set, lines are buffered."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self.call_later: Callable[[float, Callable[[], None]], object] | None = None
        self._lines: list[bytes] = []
        self._flush_is_due = False
        self.stamp = b""  # the timestamp of commands until `stamp_ends`, by the clock of ClientLog.answered
        self.stamp_ends = 0.0
        self.configure()

    def configure(self, *, level: str = "info", render: Render | None = None, journal: bool = False) -> None:
        """Set the lowest level that is logged, the renderer of lines, and whether the journal reads them."""
        self._threshold = LEVELS.index(level)
        self._render: Render = render or _to_json
        self._priorities: Mapping[str, str] = _PRIORITIES if journal else {}
        # How the line of a command begins; None: it is rendered like any other.
        self.head = None if render else self._priorities.get("info", "").encode() + b'{"command": "'

    def debug(self, event: str, **members: Any) -> None:
        """Log what helps a developer."""
        self._log("debug", event, members)

    def info(self, event: str, **members: Any) -> None:
        """Log a step of the daemon's normal life."""
        self._log("info", event, members)

    def warning(self, event: str, **members: Any) -> None:
        """Log what an operator should look at eventually."""
        self._log("warning", event, members)

    def error(self, event: str, **members: Any) -> None:
        """Log a failure, with the traceback of an exception in `exc_info`."""
        self._log("error", event, members)

    def beside(self, level: str, event: str, **members: Any) -> None:
        """Log from another thread, if `write` may be called there; it overtakes buffered lines."""
        if self.takes(level):
            self._write(self.line(level, event, members))

    def takes(self, level: str) -> bool:
        """Whether lines of that level are written."""
        return LEVELS.index(level) >= self._threshold

    def new_stamp(self, now: float) -> bytes:
        """Renew `stamp`."""
        self.stamp = _timestamp().encode()
        self.stamp_ends = now + _STAMP_SECONDS
        return self.stamp

    def append(self, line: bytes) -> None:
        """Add a finished line."""
        self._lines.append(line)
        if self.call_later is None or len(self._lines) >= FLUSH_LINES:
            self.flush()
        elif not self._flush_is_due:
            self._flush_is_due = True
            self.call_later(FLUSH_SECONDS, self._flush_late)

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            data = b"".join(self._lines)
            self._lines.clear()
            self._write(data)

    def _flush_late(self) -> None:
        self._flush_is_due = False
        self.flush()

    def line(self, level: str, event: str, members: dict[str, Any]) -> bytes:
        """The finished line of an event."""
        error = members.pop("exc_info", None)
        if error is not None:
            import traceback  # not at start

            members["exception"] = "".join(traceback.format_exception(error)).rstrip()
        members.update(event=event, level=level, timestamp=_timestamp())
        return f"{self._priorities.get(level, '')}{self._render(members)}\n".encode("utf-8", "backslashreplace")

    def _log(self, level: str, event: str, members: dict[str, Any]) -> None:
        if not self.takes(level):
            return
        self.append(self.line(level, event, members))
        if level in ("warning", "error"):
            self.flush()


class ClientLog:
    """The commands of one client, a line each: what, by whom, how long, with what result.

    `who` are the members that identify the client.
    """

    def __init__(self, log: Log, who: dict[str, int]) -> None:
        self._log = log
        self._who = who
        self._who_json = ", ".join([f'"{name}": {value}' for name, value in who.items()]).encode()
        self._lines_a_second = CLIENT_LINES if log.takes("info") else 0
        self._left = 0  # lines that may still be written in this second
        self._omitted = 0
        self._second_ends = 0.0  # by the clock of `answered`

    def answered(self, command: str, began: float, ended: float, request_id: bytes = b"",
                 error: QmpError | None = None) -> None:
        """Log an answered command; times in seconds of one clock, `request_id` is JSON, empty if there was none."""
        if ended >= self._second_ends:
            self._begin_second(ended)
        if self._left <= 0:
            self._omitted += 1
            return
        self._left -= 1
        if len(request_id) > TEXT_MAX:
            request_id = b'"(long)"'
        log = self._log
        head = log.head
        if head is None:
            self._explain(command, request_id, ended - began, error)
            return
        stamp = log.stamp if ended < log.stamp_ends else log.new_stamp(ended)
        if error is None:
            result = b"ok"
        else:
            command = _quoted(command)
            result = f'{error.error_class}", "desc": "{_quoted(error.desc)}'.encode()
        log.append(b'%b%b", "id": %b, %b, "us": %d, "result": "%b", "event": "command", "level": "info",'
                   b' "timestamp": "%b"}\n' % (head, command.encode(), request_id or b"null", self._who_json,
                                              (ended - began) * 1e6, result, stamp))

    def close(self) -> None:
        """Report what was left out."""
        if self._omitted and self._lines_a_second:
            self._log.info("commands not logged", count=self._omitted, **self._who)
        self._omitted = 0

    def _begin_second(self, now: float) -> None:
        """Report what was left out in the last second, and allow lines again."""
        self.close()
        self._left = self._lines_a_second
        self._second_ends = now + 1.0

    def _explain(self, command: str, request_id: bytes, seconds: float, error: QmpError | None) -> None:
        result = {"result": "ok"} if error is None else {"result": error.error_class, "desc": error.desc[:TEXT_MAX]}
        self._log.info("command", command=command[:TEXT_MAX], id=json.loads(request_id or b"null"), **self._who,
                       us=int(seconds * 1e6), **result)


def _quoted(text: str) -> str:
    """A client's text, cut, as it is between the quotation marks of JSON."""
    return encode_basestring_ascii(text[:TEXT_MAX])[1:-1]


def _timestamp() -> str:
    """Now, in UTC, to the millisecond."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"


def _to_json(members: dict[str, Any]) -> str:
    return json.dumps(members, default=str)


def configure_log(level: str) -> None:
    """Log to standard error: readable on a terminal, JSON otherwise, with priorities for the journal."""
    log.configure(level=level, render=for_people() if os.isatty(2) else None, journal=reads_journal(os.environ))


def reads_journal(environ: Mapping[str, str]) -> bool:
    """Whether standard error goes to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(2)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def for_people() -> Render:
    """The renderer of lines for a terminal."""
    import structlog

    renderer = structlog.dev.ConsoleRenderer()
    return lambda members: str(renderer(None, "", members))


def wait_written(seconds: float = 1.0) -> None:
    """Wait until the log is written before the process ends, but not indefinitely: nobody may be reading it."""
    log.flush()
    _stderr.wait(seconds)


def _dropped(count: int) -> bytes:
    return log.line("warning", "log lines dropped", {"count": count})


_stderr: Final = Lines(2, excuse=_dropped)
log: Final = Log(_stderr.write)

"""The audit: a JSON line for every command that changes something: who, what, with what result.

A line is written before the reply is sent, unless writing takes long. Commands that only read (the schema says which)
are left out, and so is what is not a command.  When lines cannot be written the daemon carries on; the log says so, and
how many were lost, and so does a line in the audit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container
from typing import Any, Final, NamedTuple

from gmemd.errors import QmpError, close_fd
from gmemd.observe.log import TEXT_MAX, Log, log, reads_journal
from gmemd.posix.lines import Lines
from gmemd.processes.identity import describe

TO_STDERR: Final = "-"
ARGUMENTS_MAX: Final = 64 << 10  # bytes of JSON
_HIDDEN: Final = "(hidden)"
_SECRETS: Final = frozenset(("data", "password", "secret"))  # members of secret objects
_LAST_SECONDS: Final = 1.0  # seconds; for what waits at the end
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK


class Audit:
    """The stream: a file, or standard error for TO_STDERR."""

    def __init__(self, target: str, changing: Container[str]) -> None:
        """Open it; QmpError when that fails. `changing`: the commands that have a line."""
        self._changing = changing
        self._path = "" if target == TO_STDERR else os.path.abspath(target)
        self._out = Lines(
            os.dup(2) if not self._path else _open(self._path),
            excuse=lambda count: self._lines.line("error", "audit not written", {"lost": count}),
            lost=lambda why: log.beside("error", "audit not written", desc=why),
            resumed=lambda count: log.beside("warning", "audit goes on", lost=count))
        self._lines = Log(self._write)
        self._lines.configure(journal=not self._path and reads_journal(os.environ))

    def client(self, uid: int, pid: int) -> ClientAudit:
        """The writer of one client's lines."""
        return ClientAudit(self._lines, self._changing, {"uid": uid, "pid": pid, **describe(pid)})

    def own(self, command: str, arguments: dict[str, Any]) -> None:
        """Record what gmemd did by itself, in the form of a command."""
        self._lines.info("audit", command=command, arguments=_without_secrets(arguments), uid=os.getuid(),
                         pid=os.getpid(), comm="gmemd", result="ok")

    def refused(self, uid: int, pid: int, why: str) -> None:
        """Record that a client was not let in."""
        self._lines.info("audit", command=None, uid=uid, pid=pid, **describe(pid), result="refused", desc=why)

    def reopen(self) -> None:
        """Reopen the file soon, because it may have been moved away; if that fails, the old one stays in use."""
        if self._path:
            self._out.call(self._reopen)

    def close(self) -> None:
        """Close the stream; what it does not accept soon is lost."""
        if self._out.wait(_LAST_SECONDS):
            close_fd(self._out.fd)

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._out.wait_taken()

    def _reopen(self) -> None:
        try:
            fd = _open(self._path)
        except QmpError as exc:
            log.beside("error", "audit not reopened", desc=exc.desc)
            return
        old, self._out.fd = self._out.fd, fd
        close_fd(old)


class ClientAudit(NamedTuple):
    """The changes of one client; `who` was read when it connected, before its process id could be reused."""

    lines: Log
    changing: Container[str]
    who: dict[str, Any]

    def use(self, by: dict[str, str]) -> None:
        """Say from now on by which rights: role, rule, and for a client of a made room that and its namespace."""
        self.who.update(by)

    def answered(self, command: str, arguments: dict[str, Any], *, request_id: bytes = b"",
                 error: QmpError | None = None) -> None:
        """Write the line of an answered command, if it is one that changes something; `request_id` is JSON."""
        if command not in self.changing:
            return
        members = {"command": command, "arguments": _without_secrets(arguments), **self.who}
        if request_id:
            members["id"] = json.loads(request_id) if len(request_id) <= TEXT_MAX else "(long)"
        result = {"result": "ok"} if error is None else {"result": error.error_class, "desc": error.desc[:TEXT_MAX]}
        self.lines.info("audit", **members, **result)


def _open(path: str) -> int:
    try:
        return os.open(path, _FLAGS, 0o640)
    except OSError as exc:
        raise QmpError(f"cannot open audit file '{path}': {os.strerror(exc.errno or 0)}") from exc


def _without_secrets(arguments: dict[str, Any]) -> Any:
    """The arguments with secrets replaced; only their length if they are very long."""
    shown = _hide(arguments)
    size = len(json.dumps(shown))
    return shown if size <= ARGUMENTS_MAX else f"({size} bytes)"


def _hide(value: Any) -> Any:
    if isinstance(value, dict):
        shown = {name: _HIDDEN if name in _SECRETS and not isinstance(member, dict) else _hide(member)
                 for name, member in value.items()}  # the data of a transaction's action is an object
        return shown | {"value": _HIDDEN} if shown.get("property") in _SECRETS else shown
    return [_hide(member) for member in value] if isinstance(value, list) else value

"""The protocol state of one QMP client, without I/O.

States (qmp-spec, "Capabilities Negotiation"): NEGOTIATION, where only qmp_capabilities exists, then COMMAND.
A session turns received bytes into `Request`s, each complete and with a checked envelope, and turns results into the
bytes to send. The monitor decides when a request runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.qmp.encode import Indented, encode, encode_pretty, indented, member_order
from gmemd.qmp.rows import Pieces
from gmemd.qmp.stream import NEED_DATA, LongMessage, Stream

NO_ID: Final = object()
_NO_ARGUMENTS: Final[dict[str, Any]] = {}
_LONGEST_ID: Final = 1024  # characters worth logging
_OK: Final = b'{"return": {}}\r\n'


class Postponed(Exception):
    """Why a long request is not carried out at once: its arguments are checked off the event loop."""

    def __init__(self, error: QmpError | None) -> None:
        """`error`: what is wrong with it, so far."""
        super().__init__()
        self.error = error


class Request:
    """One message of a client: a command to run, or the error that it is answered with."""

    __slots__ = ("arguments", "began", "error", "execute", "id", "oob")

    def __init__(self, execute: str, arguments: dict[str, Any], id: Any, oob: bool = False,
                 error: QmpError | Postponed | None = None) -> None:
        self.execute = execute
        self.arguments = arguments
        self.id = id
        self.oob = oob
        self.error = error
        self.began = 0.0  # when its command was started, by the monitor's clock


class Event:
    """An event, encoded once for all clients; `now` is the wall-clock time (seconds)."""

    def __init__(self, name: str, data: dict[str, Any], now: float) -> None:
        micros = int(now * 1_000_000)
        self._value: dict[str, Any] = {
            "timestamp": {"seconds": micros // 1_000_000, "microseconds": micros % 1_000_000}, "event": name}
        if data:
            self._value["data"] = data
        self._lines: dict[bool, bytes] = {}

    def line(self, *, pretty: bool) -> bytes:
        """The bytes to send."""
        if pretty not in self._lines:
            self._lines[pretty] = _line(self._value, pretty=pretty)
        return self._lines[pretty]


class Session:
    """Protocol state of one client: negotiation, capabilities, input stream, output dialect."""

    def __init__(self, version: dict[str, Any], *, pretty: bool = False,
                 weigh: Callable[[int], None] = lambda weight: None) -> None:
        """`weigh` is called with the weight of an incomplete message, and with 0 when it is complete."""
        self.negotiated = False
        self.oob = False
        self._version = version
        self.pretty = pretty
        stream = Stream(weigh)
        self.feed = stream.feed
        self._stream = stream

    def greeting(self) -> bytes:
        """The first message of a connection."""
        return _line(self.hello(), pretty=self.pretty)

    def hello(self) -> dict[str, Any]:
        """The value of the greeting."""
        return {"QMP": {"version": self._version, "capabilities": ["oob"]}}

    def next_request(self) -> Request | None:
        """Take the next complete message out of what was fed; None when more bytes are needed."""
        value = self._stream.next()
        if value is NEED_DATA:
            return None
        if type(value) is dict:
            execute = value.get("execute")
            arguments = value.get("arguments", _NO_ARGUMENTS)
            if type(execute) is str and type(arguments) is dict:
                others = len(value) - (1 if arguments is _NO_ARGUMENTS else 2)
                if not others:
                    return Request(execute, arguments, NO_ID)
                if others == 1 and "id" in value:
                    return Request(execute, arguments, value["id"])
            return self._judge_envelope(value)
        if type(value) is LongMessage:
            request = self._judge_envelope(value)
            if not request.oob:
                assert not isinstance(request.error, Postponed)
                request.error = Postponed(request.error)
            return request
        if not isinstance(value, QmpError):
            value = QmpError("QMP input must be a JSON object")
        return Request("", _NO_ARGUMENTS, NO_ID, error=value)

    def _judge_envelope(self, value: dict[str, Any]) -> Request:
        """A message that is not simply a command: find what is wrong, in member order (qmp.md section 6)."""
        oob = "exec-oob" in value and "execute" not in value
        request = Request("", _NO_ARGUMENTS, value.get("id", NO_ID), oob=oob)
        try:
            for name in member_order(value):
                self._judge_member(request, name, value[name], value)
            if not ("execute" in value or "exec-oob" in value):
                raise QmpError("QMP input lacks member 'execute'")
        except QmpError as exc:
            request.error = exc
        return request

    def _judge_member(self, request: Request, name: str, member: Any, value: dict[str, Any]) -> None:
        if name == "execute" or (name == "exec-oob" and self.oob):
            if type(member) is not str:
                raise QmpError(f"QMP input member '{name}' must be a string")
            if name == "execute" and "exec-oob" in value:
                raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
            request.execute = member
        elif name == "arguments":
            if type(member) is not dict:
                raise QmpError("QMP input member 'arguments' must be an object")
            request.arguments = member
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")

    def forget_input(self) -> None:
        """Return no more requests."""
        self._stream = Stream()  # which nobody feeds

    def refuse_mode(self, request: Request) -> QmpError | None:
        """The error for a command that does not exist in the session's state, else None."""
        if not self.negotiated and request.execute != "qmp_capabilities":
            return QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", COMMAND_NOT_FOUND)
        return None

    def negotiate(self, enable: list[str]) -> None:
        """Leave negotiation mode with the capabilities of `enable`; CommandNotFound the second time."""
        if self.negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
        self.negotiated = True
        self.oob = "oob" in enable

    def id_json(self, request: Request) -> bytes:
        """A request's id as JSON; empty if it has none."""
        request_id = request.id
        if request_id is NO_ID:
            return b""
        if type(request_id) is int:
            return encode(request_id)
        if type(request_id) is str:
            return encode(request_id) if len(request_id) <= _LONGEST_ID else b'"(long)"'
        try:
            return json.dumps(request_id, allow_nan=False).encode()
        except (ValueError, RecursionError):
            return b'"(no JSON)"'

    def success(self, request: Request, value: Any) -> bytes:
        """The reply to `request`; a `bytes` value is JSON that was encoded before."""
        if self.pretty:
            if isinstance(value, (bytes, Indented)):
                text = value.text if isinstance(value, Indented) else b"".join(indented(value))
                its_id = b"" if request.id is NO_ID else b',\r\n    "id": ' + b"".join(indented(encode(request.id)))
                return b'{\r\n    "return": %b%b\r\n}\r\n' % (text, its_id)
            reply = {"return": value}
            if request.id is not NO_ID:
                reply["id"] = request.id
            return _line(reply, pretty=self.pretty)
        if not value and type(value) is dict and request.id is NO_ID:
            return _OK
        body = value if type(value) is bytes else encode(value)
        if request.id is NO_ID:
            return b'{"return": %b}\r\n' % body
        return b'{"return": %b, "id": %b}\r\n' % (body, encode(request.id))

    def success_in_pieces(self, request: Request, value: Pieces) -> Pieces:
        """The same for a value in pieces, on one line; it is the caller's no more."""
        value[0][:0] = b'{"return": '
        value[-1] += b"}\r\n" if request.id is NO_ID else b', "id": %b}\r\n' % encode(request.id)
        return value

    def failure(self, request: Request, error: QmpError) -> bytes:
        """The error reply to `request`."""
        if request.id is NO_ID and not self.pretty:
            return b'{"error": {"class": "%b", "desc": %b}}\r\n' % (error.error_class.encode(), encode(error.desc))
        reply: dict[str, Any] = {"error": {"class": error.error_class, "desc": error.desc}}
        if request.id is not NO_ID:
            reply["id"] = request.id
        return _line(reply, pretty=self.pretty)


def refusal(error: QmpError, *, pretty: bool) -> bytes:
    """What a client is told in place of a greeting."""
    return Session({}, pretty=pretty).failure(Request("", _NO_ARGUMENTS, NO_ID), error)


def _line(value: Any, *, pretty: bool) -> bytes:
    return (encode_pretty(value) if pretty else encode(value)) + b"\r\n"

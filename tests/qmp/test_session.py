"""The protocol state machine: literal bytes in, literal bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.qmp.session import Event, Request, Session

VERSION = {"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "test"}


def session(*, pretty: bool = False, oob: bool = False, ready: bool = True) -> Session:
    made = Session(VERSION, pretty=pretty)
    if ready:
        made.negotiate(["oob"] if oob else [])
    return made


def request(made: Session, text: str) -> Request:
    made.feed(text.encode())
    taken = made.next_request()
    assert taken is not None
    return taken


def error(made: Session, text: str) -> str:
    taken = request(made, text)
    assert taken.error is not None
    return taken.error.desc


def test_greeting_names_version_and_capabilities() -> None:
    """The first message is an object with QMP, a version and the capabilities, ended by CR LF."""
    assert session(ready=False).greeting() == (
        b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": "test"}, '
        b'"capabilities": ["oob"]}}\r\n')


def test_only_negotiation_before_negotiation() -> None:
    """Before qmp_capabilities every other command, known or not, is refused; afterwards none is."""
    made = session(ready=False)
    refusal = made.refuse_mode(request(made, '{"execute":"query-version"}'))
    assert refusal is not None
    assert (refusal.desc, refusal.error_class) == (
        "Expecting capabilities negotiation with 'qmp_capabilities'", COMMAND_NOT_FOUND)
    assert made.refuse_mode(request(made, '{"execute":"qmp_capabilities"}')) is None
    made.negotiate([])
    assert made.refuse_mode(request(made, '{"execute":"query-version"}')) is None


def test_negotiation_happens_once() -> None:
    """A second negotiation is refused and changes nothing."""
    made = session(oob=True)
    with pytest.raises(QmpError, match="already complete") as caught:
        made.negotiate([])
    assert caught.value.error_class == COMMAND_NOT_FOUND
    assert made.oob


@pytest.mark.parametrize(("text", "desc"), [
    ("[]", "QMP input must be a JSON object"),
    ("{}", "QMP input lacks member 'execute'"),
    ('{"execute":true}', "QMP input member 'execute' must be a string"),
    ('{"execute":"x","arguments":[]}', "QMP input member 'arguments' must be an object"),
    ('{"execute":"x","arguments":null}', "QMP input member 'arguments' must be an object"),
    ('{"execute":"x","foo":1}', "QMP input member 'foo' is unexpected"),
    ('{"exec-oob":"x"}', "QMP input member 'exec-oob' is unexpected"),
    ('{"execute":"x" "id"}', "1:16: JSON parse error, expected ',' or '}'"),
])
def test_wrong_envelopes_are_explained(text: str, desc: str) -> None:
    """Each wrong envelope has its sentence, and the next message works."""
    made = session()
    assert error(made, text) == desc
    taken = request(made, '{"execute":"query-version"}')
    assert (taken.execute, taken.error) == ("query-version", None)


def test_execute_clashes_with_exec_oob() -> None:
    """With oob both members at once are refused, in band."""
    made = session(oob=True)
    taken = request(made, '{"exec-oob":"a","execute":"b","id":4}')
    assert taken.error is not None
    assert (taken.error.desc, taken.oob, taken.id) == (
        "QMP input member 'execute' clashes with 'exec-oob'", False, 4)


def test_malformed_exec_oob_is_out_of_band() -> None:
    """A wrong exec-oob message is marked out of band, so that it is answered at once."""
    assert request(session(oob=True), '{"exec-oob":1,"id":"x"}').oob


def test_needs_the_whole_message() -> None:
    """Byte by byte the same message comes out, once."""
    made = session()
    text = b'{"execute":"a","id":1}'
    for byte in text[:-1]:
        made.feed(bytes([byte]))
        assert made.next_request() is None
    made.feed(text[-1:])
    taken = made.next_request()
    assert taken is not None
    assert (taken.execute, taken.id) == ("a", 1)
    assert made.next_request() is None


@pytest.mark.parametrize("identity", [0, "x", None, True, [1], {"a": {}}, 1.5])
def test_ids_come_back(identity: Any) -> None:
    """Any JSON value as id comes back with success and failure."""
    made = session()
    taken = request(made, json.dumps({"execute": "a", "id": identity}))
    assert json.loads(made.success(taken, {})) == {"return": {}, "id": identity}
    assert json.loads(made.failure(taken, QmpError("no")))["id"] == identity


def test_replies_without_id() -> None:
    """A reply without id has one member; encoded values are taken as they are."""
    made = session()
    taken = request(made, '{"execute":"a"}')
    assert made.success(taken, {}) == b'{"return": {}}\r\n'
    assert made.success(taken, b'{"x": 1}') == b'{"return": {"x": 1}}\r\n'
    assert made.failure(taken, QmpError("no")) == (
        b'{"error": {"class": "GenericError", "desc": "no"}}\r\n')


def test_pretty_replies() -> None:
    """With pretty every member has its line, also of values that were encoded before."""
    made = session(pretty=True)
    taken = request(made, '{"execute":"a"}')
    assert made.success(taken, b'{"x": []}').replace(b"\r", b"") == (
        b'{\n    "return": {\n        "x": [\n        ]\n    }\n}\n')


def test_events() -> None:
    """An event has its time in seconds and microseconds, and data only if there is some."""
    assert Event("STOP", {}, 12.5).line(pretty=False) == (
        b'{"timestamp": {"seconds": 12, "microseconds": 500000}, "event": "STOP"}\r\n')
    assert json.loads(Event("X", {"a": 1}, 1.0).line(pretty=True))["data"] == {"a": 1}

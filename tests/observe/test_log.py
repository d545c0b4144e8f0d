"""The log: structlog's lines, cheap enough for every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.observe.log import CLIENT_LINES, FLUSH_LINES, ClientLog, Log, for_people

WHO = {"monitor": 3, "uid": 0, "pid": 42}


class Written(list[bytes]):
    """What a log has written, write by write."""

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in b"".join(self).splitlines()]


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def log(written: Written) -> Log:
    return Log(written.append)


def without_time(line: dict[str, Any]) -> dict[str, Any]:
    assert line.pop("timestamp").endswith("Z")
    return line


def test_an_event_has_its_members_and_level(log: Log, written: Written) -> None:
    log.warning("not kept", desc="who knows", undone=2)
    assert [without_time(line) for line in written.lines()] == \
        [{"event": "not kept", "level": "warning", "desc": "who knows", "undone": 2}]


def test_levels_below_the_least_are_not_logged(log: Log, written: Written) -> None:
    log.configure(level="warning")
    log.info("ready")
    ClientLog(log, WHO).answered("query-version", 0.0, 1.0)
    log.error("failed")
    assert [line["event"] for line in written.lines()] == ["failed"]


def test_an_exception_shows_its_traceback(log: Log, written: Written) -> None:
    try:
        raise KeyError("x")
    except KeyError as exc:
        log.error("internal error", exc_info=exc)
    assert written.lines()[0]["exception"].endswith("KeyError: 'x'")


@pytest.mark.parametrize("slowly", [False, True])
def test_a_command_has_one_line_made_fast_or_slowly(log: Log, written: Written, slowly: bool) -> None:
    if slowly:
        log.head = None
    ClientLog(log, WHO).answered("object-add", 5.0, 5.25, request_id=b'"a"')
    assert without_time(written.lines()[0]) == {
        "command": "object-add", "id": "a", **WHO, "us": 250000, "result": "ok", "event": "command", "level": "info"}


def test_a_refused_command_says_why(log: Log, written: Written) -> None:
    ClientLog(log, WHO).answered('no"such', 5.0, 5.1, error=QmpError("what?", "CommandNotFound"))
    line = written.lines()[0]
    assert (line["command"], line["result"], line["desc"], line["id"]) == \
        ('no"such', "CommandNotFound", "what?", None)


@pytest.mark.parametrize("text", ['", "level": "error', "a\nb\0\x7f", "\\", "é€😀", "\ud800", "x" * 1000, ""])
def test_what_a_client_says_stays_within_its_member(log: Log, written: Written, text: str) -> None:
    """Whatever its command is called and the refusal repeats; the same whether the line is made fast or slowly."""
    lines = []
    for head in (log.head, None):
        log.head = head
        ClientLog(log, WHO).answered(text, 1.0, 1.5, b"7", QmpError(f"{text} again", "CommandNotFound"))
        lines.append(without_time(json.loads(written.pop())))
    assert lines == 2 * [{"command": text[:200], "id": 7, **WHO, "us": 500000, "result": "CommandNotFound",
                          "desc": f"{text} again"[:200], "event": "command", "level": "info"}]


def test_a_long_id_is_not_repeated(log: Log, written: Written) -> None:
    ClientLog(log, WHO).answered("query-version", 5.0, 5.1, request_id=b'"%b"' % (b"x" * 100_000))
    assert written.lines()[0]["id"] == "(long)"


def test_lines_wait_for_the_loop_but_not_for_long(log: Log, written: Written) -> None:
    later: list[Callable[[], None]] = []
    log.call_later = lambda seconds, call: later.append(call)
    log.info("a")
    log.info("b")
    assert written == []
    assert len(later) == 1
    later[0]()
    assert [line["event"] for line in written.lines()] == ["a", "b"]
    assert len(written) == 1


def test_a_full_buffer_and_errors_do_not_wait(log: Log, written: Written) -> None:
    log.call_later = lambda seconds, call: None
    for _ in range(FLUSH_LINES):
        log.info("a")
    assert len(written.lines()) == FLUSH_LINES
    log.error("b")
    assert len(written.lines()) == FLUSH_LINES + 1


def test_a_flood_of_commands_is_summed_up(log: Log, written: Written) -> None:
    client = ClientLog(log, WHO)
    for _ in range(CLIENT_LINES + 7):
        client.answered("query-version", 0.0, 0.5)
    assert len(written.lines()) == CLIENT_LINES
    client.answered("query-version", 2.0, 2.0)
    assert [without_time(written.lines()[-2]), written.lines()[-1]["event"]] == \
        [{"event": "commands not logged", "count": 7, **WHO, "level": "info"}, "command"]
    client.close()
    assert len(written.lines()) == CLIENT_LINES + 2


def test_the_journal_gets_priorities(log: Log, written: Written) -> None:
    log.configure(journal=True)
    log.error("a")
    ClientLog(log, WHO).answered("query-version", 0.0, 0.5)
    assert [write[:4] for write in written] == [b"<3>{", b"<6>{"]


def test_structlog_renders_for_people(log: Log, written: Written) -> None:
    log.configure(render=for_people())
    ClientLog(log, WHO).answered("query-version", 0.0, 0.5)
    assert b"query-version" in written[0]
    assert not written[0].startswith(b"{")

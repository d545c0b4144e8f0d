"""The audit: one line for each change, with who did it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from gmemd.observe.audit import Audit
from gmemd.qmp.session import Session
from gmemd.schema.validate import Schema
from tests.daemon import Daemon

COMM = Path("/proc/self/comm").read_text().rstrip("\n")
RAM = {"qom-type": "memory-backend-ram", "id": "m0", "size": 4096}

CHANGING = {"object-add", "qom-set"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_daemon_tells_of_changes_only(tmp_path: Path) -> None:
    """Refused and successful changes are there with who and what, queries and unknown commands are not."""
    path = tmp_path / "audit"
    with Daemon("--audit", str(path), "--object", "memory-backend-ram,id=boot,size=4096",
                kernel="simulated") as daemon, daemon.client() as client:
        client.execute("query-memdev")
        client.execute("object-add", RAM)
        with pytest.raises(QmpError):
            client.execute("object-add", RAM)
        with pytest.raises(QmpError):
            client.execute("no-such-command")
        client.send_text(b'{"execute": "object-del", "arguments": {"id": "m0"}, "id": ["x", 7]} ', 1)
        client.execute("qom-get", {"path": "/objects/boot", "property": "size"})
        boot, added, refused, deleted = lines(path)
        daemon_pid = daemon.pid
    assert (boot["comm"], boot["pid"], boot["arguments"]["id"]) == ("gmemd", daemon_pid, "boot")
    assert {name: added[name] for name in ("command", "arguments", "uid", "pid", "comm", "result", "event")} == {
        "command": "object-add", "arguments": RAM, "uid": os.getuid(), "pid": os.getpid(), "comm": COMM,
        "result": "ok", "event": "audit"}
    assert (refused["result"], refused["desc"]) == (
        "GenericError", "attempt to add duplicate property 'm0' to object (type 'container')")
    assert (deleted["command"], deleted["id"], deleted["result"]) == ("object-del", ["x", 7], "ok")
    assert path.stat().st_mode & 0o777 & ~0o640 == 0


def test_the_line_is_there_before_the_reply(tmp_path: Path) -> None:
    """Whoever has the reply finds the line, also after an abrupt end."""
    path = tmp_path / "audit"
    with Daemon("--audit", str(path), kernel="simulated") as daemon:
        with daemon.client() as client:
            client.execute("object-add", RAM)
        daemon.stop(signal.SIGKILL)
        assert [line["command"] for line in lines(path)] == ["object-add"]


def test_sighup_reopens_the_file(tmp_path: Path) -> None:
    """After a rotation lines go to the new file, and nothing is lost."""
    path = tmp_path / "audit"
    with Daemon("--audit", str(path), kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", RAM)
        path.rename(tmp_path / "old")
        os.kill(daemon.pid, signal.SIGHUP)
        while not path.exists():
            client.execute("query-status")
        client.execute("object-del", {"id": "m0"})
        assert [line["command"] for line in lines(tmp_path / "old")] == ["object-add"]
        assert [line["command"] for line in lines(path)] == ["object-del"]


@pytest.mark.parametrize("arguments", [(), ("--audit", "-")])
def test_sighup_without_a_file_ends_nothing(arguments: tuple[str, ...]) -> None:
    """Where there is nothing to reopen, the daemon goes on, with clients and objects."""
    with Daemon(*arguments, kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", RAM)
        os.kill(daemon.pid, signal.SIGHUP)
        client.execute("object-del", {"id": "m0"})
        assert daemon.stop() == 0


def test_standard_error_takes_it_too() -> None:
    with Daemon("--audit", "-", kernel="simulated") as daemon:
        with daemon.client() as client:
            client.execute("object-add", RAM)
        daemon.stop()
        found = [json.loads(line) for line in daemon.log().splitlines() if '"audit"' in line]
    assert [line["command"] for line in found] == ["object-add"]


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QmpError) as caught:
        Audit(str(tmp_path), CHANGING)
    assert caught.value.desc == f"cannot open audit file '{tmp_path}': Is a directory"
    Audit(str(tmp_path / "file"), CHANGING).close()


def test_a_full_disk_does_not_stop_the_daemon() -> None:
    with Daemon("--audit", "/dev/full", kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", RAM)
        client.execute("object-del", {"id": "m0"})
        daemon.stop()
        found = [line for line in daemon.log().splitlines() if "audit not written" in line]
    assert len(found) == 1


def test_secrets_are_hidden_and_length_is_bounded(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path / "audit"), CHANGING)
    client = audit.client(7, os.getpid())
    client.answered("object-add", {"qom-type": "secret", "id": "s", "data": "geheim"})
    client.answered("qom-set", {"path": "/objects/s", "property": "data", "value": "geheim"})
    client.answered("object-add", {"deep": [{"password": "geheim"}]}, request_id=b'"%b"' % (b"x" * 300))
    client.answered("object-add", {"id": "x" * 100_000})
    audit.close()
    text = (tmp_path / "audit").read_text()
    assert "geheim" not in text
    assert [line["arguments"] for line in lines(tmp_path / "audit")] == [
        {"qom-type": "secret", "id": "s", "data": "(hidden)"},
        {"path": "/objects/s", "property": "data", "value": "(hidden)"},
        {"deep": [{"password": "(hidden)"}]},
        "(100010 bytes)"]
    assert lines(tmp_path / "audit")[2]["id"] == "(long)"


@pytest.mark.parametrize("document", ["qom.json", "emulator.json"])
def test_which_commands_only_read(document: str) -> None:
    """The schema says it of everything that is called query-, and of those listed here one by one."""
    schema = Schema.load(document, lab=True)
    named = {name for name in schema.commands if name.startswith(("query-", "x-query-"))}
    assert named <= schema.reading
    assert schema.reading - named == {
        "qmp_capabilities", "qom-list", "qom-get", "qom-list-get", "qom-list-types", "qom-list-properties",
        "device-list-properties"}
    assert {name for name, command in schema.commands.items() if command.reads_only} == schema.reading


def test_every_command_is_logged() -> None:
    """The log has a line for each command, with its id, monitor and result."""
    with Daemon(kernel="simulated") as daemon:
        with Client(str(daemon.sock)) as client:
            client.send_text(b'{"execute": "query-name", "id": 1.5} ', 1)
            with pytest.raises(QmpError):
                client.execute("object-del", {"id": "x"})
        daemon.stop()
        found = [json.loads(line) for line in daemon.log().splitlines() if '"event": "command"' in line]
    told = [(line["command"], line["id"], line["result"]) for line in found]
    assert told[0][0] == "qmp_capabilities"
    assert told[1] == ("query-name", 1.5, "ok")
    assert (told[2][0], told[2][2]) == ("object-del", "GenericError")
    assert {(line["monitor"], line["uid"], line["pid"]) for line in found} == {
        (found[0]["monitor"], os.getuid(), os.getpid())}


@pytest.mark.parametrize(("message", "shown"), [
    (b'{"execute": "quit"} ', b""), (b'{"execute": "quit", "id": 7} ', b"7"),
    (b'{"execute": "quit", "id": "\xc3\xa9"} ', b'"\\u00E9"'),
    (b'{"execute": "quit", "id": [null, 0.5]} ', b"[null, 0.5]"),
    (b'{"execute": "quit", "id": 1e400} ', b'"(no JSON)"')])
def test_an_id_is_always_shown_as_json(message: bytes, shown: bytes) -> None:
    """QMP lets through ids that JSON has no form for; the log does not."""
    session = Session({})
    session.feed(message)
    request = session.next_request()
    assert request is not None
    assert session.id_json(request) == shown

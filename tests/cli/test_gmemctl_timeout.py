"""--timeout bounds all that gmemctl waits for: a server without room, without a greeting, without an answer."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from gmemd.cli.connection import Connection
from gmemd.cli.gmemctl import VERBS, main
from gmemd.cli.parser import make_parser, verbs_of
from gmemd.cli.tab import Completion
from gmemd.client.client import Client
from gmemd.posix.sockets import bind_unix
from tests.patience import PATIENCE

GREETING = json.dumps({"QMP": {"version": {"qemu": {}, "package": ""}, "capabilities": []}}).encode() + b"\r\n"
SECONDS = 0.2
Say = Callable[[socket.socket], None]


def greeted(client: socket.socket) -> None:
    """Greet, and answer the negotiation."""
    client.sendall(GREETING)
    request = json.loads(client.recv(4096))
    client.sendall(json.dumps({"return": {}, "id": request["id"]}).encode() + b"\r\n")


def half(client: socket.socket) -> None:
    greeted(client)
    client.recv(4096)
    client.sendall(b'{"return": [')


def dripping(client: socket.socket) -> None:
    """A byte at a time, forever."""
    for byte in b'{"QMP": "' + b"x" * (1 << 20):
        client.sendall(bytes([byte]))
        time.sleep(SECONDS / 10)


SERVERS: dict[str, Say] = {
    "no greeting": lambda client: None,
    "half a greeting": lambda client: client.sendall(GREETING[:20]),
    "a greeting drop by drop": dripping,
    "no negotiation": lambda client: client.sendall(GREETING),
    "no answer": greeted,
    "half an answer": half,
}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[Say], str]]:
    """Run a server that says something to each client, and nothing more."""
    with ExitStack() as stack:
        def start(say: Say) -> str:
            path = str(tmp_path / "q")
            listener = stack.enter_context(bind_unix(path))
            listener.setblocking(True)
            clients: list[socket.socket] = []
            stack.callback(lambda: [client.close() for client in clients])
            stack.callback(listener.shutdown, socket.SHUT_RDWR)

            def accept() -> None:
                with suppress(OSError):
                    while True:
                        clients.append(listener.accept()[0])
                        threading.Thread(target=one, args=(clients[-1],), daemon=True).start()

            def one(client: socket.socket) -> None:
                with suppress(OSError, ValueError):
                    say(client)

            threading.Thread(target=accept, daemon=True).start()
            return path

        yield start


@pytest.fixture
def full(tmp_path: Path) -> Iterator[str]:
    """A listening socket whose backlog is full."""
    path = str(tmp_path / "full")
    with bind_unix(path, backlog=0), socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        yield path


@pytest.mark.parametrize("server", SERVERS)
def test_the_client_gives_up(server: str, serve: Callable[[Say], str]) -> None:
    """TimeoutError, whatever the server leaves out; with `wait` too."""
    path = serve(SERVERS[server])
    with pytest.raises(TimeoutError), Client(path, timeout=SECONDS, wait=SECONDS) as client:
        client.execute("query-version")


def test_the_client_gives_up_at_a_full_queue(full: str) -> None:
    """Connecting has an end, too."""
    with pytest.raises(TimeoutError):
        Client(full, timeout=SECONDS)


def test_a_place_that_becomes_free_is_taken(tmp_path: Path) -> None:
    """A client that waits for room in the queue gets it."""
    path = str(tmp_path / "q")
    with bind_unix(path, backlog=0) as listener, socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)

        def accept() -> None:
            listener.setblocking(True)
            listener.accept()[0].close()
            with listener.accept()[0] as client:
                greeted(client)

        later = threading.Timer(SECONDS, accept)
        later.start()
        Client(path, timeout=PATIENCE).close()
        later.join()


def words_of(verb: str) -> list[str]:
    """A right command line of a verb."""
    parser = verbs_of(make_parser(VERBS))[verb]
    given = []
    for action in parser._actions:
        if not action.option_strings and (action.nargs != "*" or action.dest == "id"):
            given.append(str(next(iter(action.choices))) if action.choices else "x")
    extra = {"create": ["memory-backend-ram,id=x,size=4096"], "exec": ["x", "--", "true"], "fork": ["x", "--", "true"],
             "run": ["--capture", "x", "--", "true"], "completion": ["ids"],
             "replace": ["x", "--qmp", "/no/such/socket", "--", "true"],
             "events": ["--for", str(SECONDS)], "qmp": ['{"execute": "query-version"}'], "call": ["query-version"],
             "adopt": ["--pid", str(os.getpid()), "--memfd", "of-this-test"],
             "attach": ["x", "--qmp", "/nowhere"], "detach": ["x", "--qmp", "/nowhere"],
             "checkpoint": ["x", "--qmp", "/nowhere"], "rollback": ["x", "--", "true"],
             "move": ["x", "--to", "exec:cat"],
             "snapshot import": ["/dev/null", "x"], "snapshot prune": ["--keep", "1"]}
    return [*verb.split(), *extra.get(verb, given)]


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("doctor", "help", "nodes")])
def test_every_verb_ends(verb: str, full: str, serve: Callable[[Say], str], capfd: pytest.CaptureFixture[str],
                         monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """No verb waits longer than it is told, for the connection or for an answer; nodes asks a cluster."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    Path("x").write_text('{"version": 1, "objects": [{"qom-type": "memory-backend-ram", "id": "x", "size": "1M"}]}')
    silent = serve(greeted)
    words = words_of(verb)
    memory = os.memfd_create("of-this-test")
    request.addfinalizer(lambda: os.close(memory))
    os.ftruncate(memory, 4096)
    runs = verb in ("exec", "run", "rollback")
    assert main(["--socket", full, "--timeout", str(SECONDS), *words]) == (125 if runs else 3)
    assert "no greeting" in capfd.readouterr().err
    if verb != "shell":  # without input it asks nothing
        expected = 125 if runs else 0 if verb == "events" else 4
        assert main(["--socket", silent, "--timeout", str(SECONDS), *words]) == expected


@pytest.mark.parametrize("words", [["ls"], ["can"], ["rm", "x"], ["create", "memory-backend-ram,id=x,size=1M"]])
def test_a_server_that_lets_nobody_in(words: list[str], serve: Callable[[Say], str],
                                      capfd: pytest.CaptureFixture[str]) -> None:
    """What it says instead of a greeting is the error, and there is nobody to ask for hints."""
    refused = b'{"error": {"class": "GenericError", "desc": "this client is not let in"}}\r\n'
    path = serve(lambda client: client.sendall(refused))
    assert main(["--socket", path, *words]) == 3
    assert capfd.readouterr().err == f"gmemctl: {path}: this client is not let in\n  hint: the server's log says why\n"


def test_completion_has_a_limit_of_its_own(serve: Callable[[Say], str]) -> None:
    """A person at a keyboard does not wait forever, even without a limit."""
    path = serve(greeted)
    assert main(["--socket", path, "completion", "ids"]) == 4
    with Client(path, timeout=PATIENCE) as client:
        client.timeout = None
        completion = Completion(Connection(lambda: client, VERBS))
        assert completion.candidate("show ", 0) is None
        assert client.timeout is None


@pytest.mark.parametrize("given", ["nan", "inf", "-1", "x", "1e300"])
@pytest.mark.parametrize("option", ["--timeout", "--wait"])
def test_times_that_cannot_be_waited(option: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are said to be none, before anything is done."""
    with pytest.raises(SystemExit) as end:
        main([f"{option}={given}", "ls"])
    assert end.value.code == 2
    assert f"'{given}' is not a number of seconds" in capsys.readouterr().err

"""gmemctl shell: scripts on standard input, a terminal, completion."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest

from gmemd.cli.connection import Connection
from gmemd.cli.gmemctl import VERBS
from gmemd.cli.tab import Completion
from gmemd.cli.verbs.shell import history_path
from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import gmemctl as command_line


def script(daemon: Daemon, *lines: str) -> subprocess.CompletedProcess[str]:
    """Run the lines in a shell."""
    return subprocess.run(
        command_line("--socket", str(daemon.sock), "shell"),
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.usefixtures("client")
def test_script(shared: Daemon) -> None:
    """Verbs, commands and raw QMP, also over several lines, run one after another; no prompt is printed."""
    done = script(
        shared,
        "# a comment, then nothing",
        "",
        "create memory-backend-memfd,id=m0,size=64K",
        "object-add 'qom-type=memory-backend-ram' id=m1 size=4K",
        "qom-get path=m1 property=size",
        '{"execute":',
        '  "query-name"}',
        "exec m0 -- echo {m0.size}",
        "rm m0 m1 --dry-run",
        "help rm",
        "rm m0 m1",
        "call query-memdev -o json",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert (lines[:3], lines[-1]) == (["4096", '{"return": {}}', "65536"], "[]")
    assert [line[:17] for line in lines[3:6]] == ["object-del would ", "object-del would ", "usage: gmemctl rm"]


@pytest.mark.usefixtures("client")
def test_script_goes_on_after_a_mistake(shared: Daemon) -> None:
    """Errors are reported, the rest still runs, and the status says that there was one."""
    done = script(
        shared, "show m0", "object-del", "nonsense", "ls --bogus", "'", "a b", "quit", "query-name", "exit", "x"
    )
    assert (done.returncode, done.stdout) == (1, "")
    told = [line for line in done.stderr.splitlines() if line.startswith("gmemctl")]
    assert told == [
        "gmemctl: object 'm0' not found",
        "gmemctl: Parameter 'id' is missing",
        "gmemctl: The command nonsense has not been found",
        "gmemctl ls: error: unrecognized arguments: --bogus",
        "gmemctl: No closing quotation",
        "gmemctl: 'b' is not of the form key=value",
        "gmemctl: 'quit' would end the server: 'call quit' does that, 'exit' leaves this shell",
    ]


def test_help(shared: Daemon) -> None:
    """help says what a line may be."""
    assert "show" in script(shared, "help").stdout


def test_server_ends() -> None:
    """call quit ends the server; its last event is printed, then the connection is lost: 3."""
    with Daemon(kernel="simulated") as daemon:
        done = script(daemon, "call quit", "query-name")
        assert done.returncode == 3
        assert daemon.wait() == 0
    assert "SHUTDOWN  guest=false  reason=host-qmp-quit" in done.stdout


@pytest.fixture
def completion(client: Client) -> Completion:
    client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "ram0", "size": 4096})
    return Completion(Connection(lambda: client, VERBS))


@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("query-k", ["query-kvm "]),
        ("sho", ["show "]),
        ("show ", ["ram0 "]),
        ("show x", []),
        ("ls ", ["ram0 "]),
        ("doctor ", []),
        ("call query-k", ["query-kvm "]),
        ("object-del ", ["id="]),
        ("object-del id=", ["id=ram0 "]),
        ("call object-del id=r", ["id=ram0 "]),
        ("object-add qom-type=memory-backend-f", ["qom-type=memory-backend-file "]),
        ("object-add qom-type=memory-backend-memfd guest", ["guest-memfd="]),
        ("object-add qom-type=memory-backend-ram guest", []),
        ("object-add qom-type=memory-backend-memfd share=", ["share=off ", "share=on "]),
        ("object-add id=", []),
        ("object-add size=1M siz", []),
        ("qom-list path=/obj", ["path=/objects/ram0 "]),
        ("nonsense a", []),
        ("nonsense a=", []),
    ],
)
def test_completion(completion: Completion, line: str, candidates: list[str]) -> None:
    """The last word may become what introspection allows there, or an object that exists."""
    assert completion.candidates(line) == candidates


def test_completion_as_readline_asks(completion: Completion) -> None:
    """readline counts up from 0 until there is no more."""
    assert [completion.candidate("query-k", state) for state in (0, 1)] == ["query-kvm ", None]
    assert len(completion.candidates("")) > 30


def test_completion_without_server() -> None:
    """A server that has gone completes nothing and breaks nothing."""
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        completion = Completion(Connection(lambda: client, VERBS))
        daemon.stop()
        assert completion.candidate("query-", 0) is None


def test_history_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history is state, not configuration."""
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    assert history_path() == "/s/gmemd/gmemctl-history"


@pytest.mark.usefixtures("client")
def test_terminal(shared: Daemon, tmp_path: Path) -> None:
    """On a terminal there is a prompt, Tab completes, Ctrl-C drops a line, Ctrl-D leaves, lines are kept."""
    pid, fd = pty.fork()
    if pid == 0:
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "INPUTRC": "/dev/null"}
        argv = command_line("--socket", str(shared.sock), "shell")
        os.execve(argv[0], argv, environment)

    def read_until(text: str, again: bytes = b"") -> str:
        """`again` is typed once a second: CPython misses a signal between its prompt and its select(2)."""
        got, end = b"", time.monotonic() + PATIENCE
        while text.encode() not in got:
            assert time.monotonic() < end, got
            if select.select([fd], [], [], 1)[0]:
                got += os.read(fd, 4096)
            else:
                os.write(fd, again)
        return got.decode()

    try:
        read_until("gmemctl> ")
        os.write(fd, b"query-kv\t")
        read_until("query-kvm ")
        os.write(fd, b"\n")
        assert "enabled  false" in read_until("gmemctl> ")
        os.write(fd, b'{"execute":\n')
        read_until("...> ")
        os.write(fd, b"\x03")
        read_until("gmemctl> ", again=b"\x03")
        os.write(fd, b"\x04")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(fd)
    assert status == 0
    history = tmp_path / "gmemd" / "gmemctl-history"
    assert history.read_text().splitlines()[0].rstrip() == "query-kvm"
    assert history.stat().st_mode & 0o777 == 0o600


def test_json_output(shared: Daemon) -> None:
    """-o json of the shell holds for its lines; a line's own -o goes before it."""
    done = subprocess.run(
        command_line("--socket", str(shared.sock), "-o", "json", "shell"),
        input="query-kvm\nls -o table\nls\n",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    kvm, _, rest = done.stdout.partition("ID  TYPE")
    assert json.loads(kvm)["enabled"] is False
    assert rest.splitlines()[-1] == "[]"

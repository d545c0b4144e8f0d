"""Programs that are started without standard streams do their work all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import children
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import gmemctl

CLOSINGS = ("2>&-", "<&- >&- 2>&-")
SERVERS = {
    "gmemd": ["gmemd", "--persist", "off", "--kernel", "simulated", "--qmp", "unix:{sock}",
              "--http", "unix:{sock}.http"],
    "keeper": ["gmemd", "--keeper", "--kernel", "simulated", "--qmp", "unix:{sock}", "--state-dir", "{sock}.state"],
    "emulator": ["gmemd.emulator.main", "-machine", "none", "-S", "-qmp", "unix:{sock},server=on,wait=off"],
    "emulator, daemonized": ["gmemd.emulator.main", "-machine", "none", "-S", "-daemonize",
                             "-qmp", "unix:{sock},server=on,wait=off"],
}


def start(words: list[str], closing: str) -> subprocess.Popen[bytes]:
    command = ["bash", "-c", f'exec "$0" "$@" {closing}', sys.executable, "-m", *words]
    return subprocess.Popen(command, env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""})


def streams(pid: int) -> list[str]:
    return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)]



@pytest.mark.parametrize("closing", CLOSINGS)
@pytest.mark.parametrize("server", SERVERS)
def test_servers(server: str, closing: str, tmp_path: Path) -> None:
    """It serves, and what was closed is nothing: no socket, no memory, no store."""
    (tmp_path / "q.state").mkdir()
    process = start([word.format(sock=tmp_path / "q") for word in SERVERS[server]], closing)
    try:
        with Client(tmp_path / "q", wait=PATIENCE, timeout=PATIENCE) as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "r", "size": 4096})
            if server == "emulator, daemonized":
                assert process.wait(PATIENCE) == 0
            else:
                pids = [process.pid, *children(process.pid)]
                assert len(pids) == 1 + (server == "keeper")
                for pid in pids:
                    opened = streams(pid)
                    assert {opened["<>2".index(mark[0])] for mark in closing.split()} == {"/dev/null"}
            client.execute("quit")
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)


@pytest.mark.parametrize("closing", CLOSINGS)
def test_gmemctl(closing: str, daemon: Daemon) -> None:
    """It does what it is told, and what it runs has nothing in the place of what was closed."""
    look = "import os; [os.fstat(fd) for fd in (0, 1, 2)]; assert os.fstat({r.fd}).st_size == 4096"
    for words, status in ((["create", "memory-backend-memfd,id=r,size=4096"], 0), (["-o", "json", "ls"], 0),
                          (["nonsense"], 2), (["show", "nonsense"], 1), (["shell"], 0),
                          (["exec", "r", "--", sys.executable, "-c", look], 0)):
        command = gmemctl("--socket", str(daemon.sock), *words)
        assert start(command[2:], closing).wait(PATIENCE) == status, words


def test_demo() -> None:
    """gmemd demo runs although nobody reads its story."""
    assert start(["gmemd", "demo", "--kernel", "simulated"], "<&- >&- 2>&-").wait(PATIENCE) == 0


def test_output_goes_where_it_is_still_open(daemon: Daemon) -> None:
    """What is open stays what it is."""
    command = ["bash", "-c", '"$0" "$@" <&- 2>&-', *gmemctl("-o", "json", "--socket", str(daemon.sock), "ls")]
    assert json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE).stdout) == []

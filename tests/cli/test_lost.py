"""Lost objects are shown where people look: in lists, and where their ids are used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.cli.gmemctl import main
from gmemd.client.client import Client
from gmemd.client.running import children, state
from tests.patience import PATIENCE


def start(path: Path) -> subprocess.Popen[bytes]:
    with path.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "gmemd", "--keeper", "--qmp", f"unix:{path}",
                                 "--kernel", "simulated", "--state-dir", str(path.parent)],
                                stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def sock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gmemd whose keeper was killed, so that two of its objects are lost; a third one is there."""
    path = tmp_path_factory.mktemp("lost") / "q"
    keeper = start(path)
    with Client(path, wait=PATIENCE, timeout=PATIENCE) as client:
        for name in ("b", "a"):
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": 1 << 20})
        daemons = children(keeper.pid)
        for pid in (keeper.pid, *daemons):
            os.kill(pid, signal.SIGKILL)
        keeper.wait(PATIENCE)
        while any(state(pid) not in "ZX" for pid in daemons):  # until then the socket is in use
            time.sleep(0.01)
    keeper = start(path)
    with Client(path, wait=PATIENCE, timeout=PATIENCE) as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "c", "size": 4096})
        assert [record["id"] for record in client.execute("query-memdev-lost")] == ["b", "a"]
    yield str(path)
    keeper.terminate()
    keeper.wait(PATIENCE)


def test_lists_have_them(sock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """ls and survive list them among the others, and say how to be rid of them; for programs nothing changes."""
    for verb, row in (("ls", "a   memfd  lost"), ("survive", "a   (lost already)")):
        assert main(["--socket", sock, verb]) == 0
        said = capsys.readouterr()
        assert row in said.out
        assert [line.split()[0] for line in said.out.splitlines()[1:]] == sorted(
            line.split()[0] for line in said.out.splitlines()[1:])
        assert "the memory of 2 objects is lost; to remove it and free the id: gmemctl rm a b" in said.err
        assert main(["--socket", sock, "-o", "json", verb]) == 0
        said = capsys.readouterr()
        assert [status["id"] for status in json.loads(said.out)] == ["c"]
        assert "gmemctl rm a b" in said.err
    assert main(["--socket", sock, "-o", "name", "ls"]) == 0
    assert "gmemctl rm a b" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["show", "a"], ["survive", "a"], ["who", "a"], ["get-fd", "a"], ["ranges", "a"], ["verify", "a"],
    ["convert", "a", "private"], ["create", "memory-backend-memfd,id=a,size=4096"],
])
def test_whoever_names_one_is_told(words: list[str], sock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its id is refused, with the reason and the way out; the one that is there is shown."""
    assert main(["--socket", sock, *words]) == 1
    said = capsys.readouterr().err
    assert "its memory (memory-backend-memfd, 1048576 bytes) did not come back with the daemon" in said
    assert "'gmemctl rm a' removes it and frees the id" in said
    assert main(["--socket", sock, "show", "c"]) == 0


def test_the_way_out(sock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """rm frees the id, which completion offers, for a new object."""
    assert main(["--socket", sock, "completion", "ids"]) == 0
    assert capsys.readouterr().out.split() == ["a", "b", "c"]
    assert main(["--socket", sock, "rm", "b"]) == 0
    assert main(["--socket", sock, "create", "memory-backend-memfd,id=b,size=4096"]) == 0
    assert main(["--socket", sock, "ls"]) == 0
    said = capsys.readouterr()
    assert "the memory of 1 object is lost; to remove it and free the id: gmemctl rm a" in said.err
    assert main(["--socket", sock, "rm", "b"]) == 0

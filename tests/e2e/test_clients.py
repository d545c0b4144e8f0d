"""QMP clients that others wrote drive gmemd."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import qmp
from qemu.qmp import QMPClient

from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.programs import needs, output

pytestmark = pytest.mark.e2e


def replies(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_qmp_shell(daemon: Daemon, tmp_path: Path) -> None:
    """Commands piped into qmp-shell come back answered."""
    commands = ["query-name",
                "object-add qom-type=memory-backend-memfd id=m0 size=4194304 share=true",
                "qom-get path=/objects/m0 property=size",
                "object-del id=m1"]
    shell = output([sys.executable, "-m", "qemu.qmp.qmp_shell", str(daemon.sock)],
                   text="\n".join(commands) + "\n", env={**os.environ, "HOME": str(tmp_path)})
    answers = [json.loads(line) for line in shell.replace("(QEMU) ", "").splitlines() if line.startswith("{")]
    assert answers == [
        {"return": {}},
        {"return": {}},
        {"return": 4194304},
        {"error": {"class": "GenericError", "desc": "object 'm1' not found"}},
    ]


async def test_qemu_qmp_library(daemon: Daemon) -> None:
    """The qemu.qmp library negotiates (with oob), executes, gets errors and the SHUTDOWN event."""
    client = QMPClient("test")
    await client.connect(str(daemon.sock))
    try:
        ram = {"qom-type": "memory-backend-ram", "id": "r0", "size": 4096}
        assert await client.execute("object-add", ram) == {}
        [memdev] = await client.execute("query-memdev")
        assert (memdev["id"], memdev["size"]) == ("r0", 4096)
        assert await client.execute("yank", {"instances": []}, oob=True) == {}
        with pytest.raises(Exception, match="Parameter 'size' is missing"):
            await client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "r1"})
        with client.listener("SHUTDOWN") as events:
            await client.execute("quit")
            assert (await events.get())["data"] == {"guest": False, "reason": "host-qmp-quit"}
    finally:
        with suppress(EOFError):  # the daemon has gone first
            await client.disconnect()
    assert daemon.wait() == 0


@needs("socat")
def test_socat_pipe(daemon: Daemon) -> None:
    """A socat one-liner gets all its answers: what was sent before the half-close is still done."""
    commands = [{"execute": "qmp_capabilities"},
                {"execute": "object-add",
                 "arguments": {"qom-type": "memory-backend-memfd", "id": "m0", "size": 4096}, "id": 1},
                {"execute": "query-memdev", "id": 2}]
    text = output(["socat", "-t", "10", "-", f"UNIX-CONNECT:{daemon.sock}"],
                  text="".join(json.dumps(command) for command in commands))
    greeting, negotiated, added, listed = replies(text)
    assert "QMP" in greeting
    assert negotiated == {"return": {}}
    assert added == {"return": {}, "id": 1}
    assert listed["return"][0]["id"] == "m0"


@needs("socat")
def test_socat_half_close_in_a_message(daemon: Daemon) -> None:
    """A message that the half-close cuts off is dropped without a word; the next client is served."""
    text = output(["socat", "-t", "10", "-", f"UNIX-CONNECT:{daemon.sock}"], text='{"execute": "qmp_capab')
    assert len(replies(text)) == 1  # the greeting
    with daemon.client() as client:
        assert client.execute("query-name") == {}


@needs("socat")
def test_socat_on_a_terminal(daemon: Daemon) -> None:
    """What a person types into socat, line by line on a terminal, is answered line by line."""
    ours, theirs = pty.openpty()
    socat = subprocess.Popen(["socat", "-", f"UNIX-CONNECT:{daemon.sock}"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        for typed, answer in ((b"", b'{"QMP": '),
                              (b'{"execute": "qmp_capabilities"}', b'\n{"return": {}}\r'),
                              (b'{"execute": "query-name", "id": 1}', b'\n{"return": {}, "id": 1}\r'),
                              (b"oops", b"JSON parse error")):
            if typed:
                os.write(ours, typed + b"\n")
            end = time.monotonic() + PATIENCE
            while answer not in seen:
                assert time.monotonic() < end, seen
                seen += os.read(ours, 4096)
    finally:
        socat.terminate()
        socat.wait()
        os.close(ours)


def test_pypi_qmp(daemon: Daemon) -> None:
    """PyPI's package qmp, QEMU's old library: commands without a newline, an error, an event."""
    with qmp.QEMUMonitorProtocol(str(daemon.sock)) as client:
        client.connect()
        client.settimeout(PATIENCE)
        client.command("object-add", **{"qom-type": "memory-backend-memfd", "id": "m0", "size": 4096})
        assert [entry["id"] for entry in client.command("query-memdev")] == ["m0"]
        assert client.cmd("object-del", {"id": "m1"})["error"]["desc"] == "object 'm1' not found"
        assert client.cmd("quit") == {"return": {}}
        assert client.pull_event(wait=PATIENCE)["event"] == "SHUTDOWN"
    assert daemon.wait() == 0


@needs("tmux")
def test_qmp_tui(daemon: Daemon, tmp_path: Path) -> None:
    """qmp-tui under tmux: it connects, sends what is typed, and shows the reply."""
    def tmux(*words: str) -> str:
        return output(["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null", *words])

    def screen() -> str:
        tmux("send-keys", "Down")  # it draws only on a key; this one leads from the history to the editor
        return tmux("capture-pane", "-p")

    command = f"{sys.executable} -m qemu.qmp.qmp_tui {daemon.sock}"
    tmux("new-session", "-d", "-x", "100", "-y", "40", command)
    try:
        wait_for(lambda: "[Connected" in screen())
        text = {"execute": "object-add", "arguments": {"qom-type": "memory-backend-ram", "id": "tui0", "size": 4096}}
        tmux("send-keys", *["Down"] * 9)
        tmux("send-keys", "-l", json.dumps(text))
        wait_for(lambda: "> {" in tmux("capture-pane", "-p"))
        tmux("send-keys", "M-Enter")
        with daemon.client() as client:
            wait_for(lambda: [entry["id"] for entry in client.execute("query-memdev")] == ["tui0"])
        wait_for(lambda: '"return": {}' in screen())
    finally:
        tmux("kill-server")


_NODE = """
const QMP = require("qemu-qmp");
const qmp = new QMP();
qmp.connect(process.argv[2], (err) => {
  if (err) throw err;
  qmp.execute("object-add", {"qom-type": "memory-backend-memfd", id: "n0", size: 4096}, (err) => {
    if (err) throw err;
    qmp.execute("query-memdev", (err, list) => {
      qmp.execute("object-del", {id: "n1"}, (refusal) => {
        console.log(JSON.stringify([qmp.version.qemu.major, list[0].id, refusal.message]));
        qmp.end();
      });
    });
  });
});
"""


@needs("npm")
def test_npm_qemu_qmp(daemon: Daemon, tmp_path: Path) -> None:
    """npm's qemu-qmp: two messages in one write, and it waits for our end of the connection."""
    installed = subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "qemu-qmp@0.5.0"],
                               cwd=tmp_path, timeout=PATIENCE, capture_output=True, check=False)
    if installed.returncode != 0:
        pytest.skip("needs npm's registry")
    script = tmp_path / "client.js"
    script.write_text(_NODE)
    assert json.loads(output(["node", str(script), str(daemon.sock)])) == [11, "n0", "object 'n1' not found"]

"""QMP clients that others wrote drive gmemd."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests.daemon import Daemon
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

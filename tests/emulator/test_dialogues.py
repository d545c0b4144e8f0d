"""What QEMU 11.1 said, byte for byte: to requests about memory devices and /machine, and to command lines.

script/record-emulator recorded it: data/dialogues.jsonl, data/command-lines.jsonl.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gmemd.emulator.commandline import parse
from gmemd.emulator.main import shown, tell
from gmemd.errors import QmpError
from gmemd.qmp.encode import encode
from tests.emulator.conftest import Start

DATA = Path(__file__).parent / "data"
DIALOGUES = [json.loads(line) for line in (DATA / "dialogues.jsonl").read_text().splitlines()]
COMMAND_LINES = [json.loads(line) for line in (DATA / "command-lines.jsonl").read_text().splitlines()]


async def reply(machine: Any, request: dict[str, Any]) -> str:
    """The line with which a request is answered."""
    try:
        result = await machine.execute(request["execute"], request.get("arguments"))
    except QmpError as exc:
        return encode({"error": {"class": exc.error_class, "desc": exc.desc}}).decode()
    return '{"return": ' + (result if isinstance(result, bytes) else encode(result)).decode() + "}"


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=[row["name"] for row in DIALOGUES])
async def test_dialogue(dialogue: dict[str, Any], start: Start, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request of a recorded dialogue with a machine that does not run gets the recorded reply."""
    monkeypatch.chdir(tmp_path)
    machine = await start(*dialogue["argv"], "-S")
    replies = [(request, await reply(machine, request)) for request, _ in dialogue["steps"]]
    assert replies == [(request, recorded) for request, recorded in dialogue["steps"]]


@pytest.mark.parametrize("row", COMMAND_LINES, ids=[" ".join(row["argv"]) for row in COMMAND_LINES])
async def test_command_line(row: dict[str, Any], start: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line with which QEMU ends ends the emulator with the same status, after the same words."""
    monkeypatch.chdir(tmp_path)
    status = 0
    try:
        text = shown(parse(row["argv"], tell))
        if text is None:
            await start(*row["argv"])
            status = -1  # it runs
        else:
            print(text)
    except QmpError as exc:
        tell(exc.desc)
        status = 1
    said = capsys.readouterr()
    assert (status, said.out, said.err) == (row["status"], row["stdout"], row["stderr"])

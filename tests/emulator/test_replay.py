"""What libvirt 9.0 and 12.8 were recorded to say, said to gmemd-emulator (data/libvirt-*.jsonl)."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.emulator.conftest import Process, Start, refusal
from tests.patience import PATIENCE

DATA = Path(__file__).parent / "data"
PROBE = [json.loads(line) for line in (DATA / "libvirt-probe-minimal.jsonl").read_text().splitlines()]
DIALOGUE = [json.loads(line) for line in (DATA / "libvirt-domain-dialogue.jsonl").read_text().splitlines()]
COMMAND_LINES = {row["n"]: row for row in DIALOGUE if "argv" in row}
STARTS = {number: row for number, row in COMMAND_LINES.items() if row["domain"] != "probe"}


def words_of(row: dict[str, Any], folder: Path) -> list[str]:
    """A recorded command line without the program, memory files in `folder`."""
    words = [re.sub(r"/var/lib/libvirt/qemu/ram/[^\"]*/", f"{folder}/", word) for word in row["argv"]]
    return words[1:] if words[0].startswith("/") else words


# -- every command line


@pytest.mark.parametrize("row", STARTS.values(), ids=[f"{n}: {row['domain']}" for n, row in STARTS.items()])
async def test_command_line(row: dict[str, Any], start: Start, tmp_path: Path) -> None:
    """Each recorded command line starts a machine with its memory, or is refused as QEMU refuses it."""
    words = words_of(row, tmp_path)
    if row["domain"] == "one NUMA cell, a dimm at start":  # recorded without ACPI from something that took anything
        assert (await refusal(start, *words)).endswith("missing acpi device or acpi disabled")
        words = [word for word in words if word != "-no-acpi"]
    try:
        machine = await start(*words)
    except QmpError as exc:
        host = {"domain type 'kvm'": "failed to initialize kvm", "2 MiB huge pages, memfd": "Cannot allocate memory"}
        assert host[row["domain"]] in exc.desc  # noqa: PT017 - the host lacks what the domain needs
        return
    summary = await machine.run("query-memory-size-summary")
    assert summary["base-memory"] == 64 << 20
    assert sum(entry["size"] for entry in json.loads(await machine.run("query-memdev"))) == sum(summary.values())
    assert (await machine.run("query-status"))["status"] == "prelaunch"


# -- the probe and the smallest answers


@contextmanager
def emulator(row: dict[str, Any], folder: Path) -> Iterator[tuple[Process, Client]]:
    """The emulator on a recorded command line; its libvirt monitor is a listening socket that is handed over."""
    path = folder / "monitor.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        words = [re.sub(r"fd=\d+", f"fd={listener.fileno()}", word) for word in words_of(row, folder)]
        words = [word for word in words if word != "-no-acpi"]
        with Process(*words, pass_fds=(listener.fileno(),)) as process, Client(path, timeout=PATIENCE) as client:
            yield process, client


def replies(client: Client, send: dict[str, Any]) -> dict[str, Any]:
    """The reply to a message as libvirt sends it, with the ends of line it uses."""
    [reply] = client.send_text(json.dumps(send).encode() + b"\r\n", 1)
    return reply


def assert_covers(minimal: Any, answer: Any, where: str) -> None:
    """All members that the smallest answer has are in an answer; in a list, in each entry."""
    assert type(answer) is type(minimal), where
    if isinstance(minimal, dict):
        for name, value in minimal.items():
            assert name in answer, f"{where}.{name}"
            assert_covers(value, answer[name], f"{where}.{name}")
    elif isinstance(minimal, list) and minimal:
        assert answer or where == "query-memory-devices", where  # on reconnection nothing is plugged any more
        for entry in answer:
            if isinstance(entry, dict):
                assert minimal[0].keys() - {"default-ram-id"} <= entry.keys(), where


@pytest.mark.parametrize("libvirt", ["9.0", "12.8"])
@pytest.mark.parametrize("accel", ["kvm:tcg", "tcg"])
def test_probe(libvirt: str, accel: str) -> None:
    """Every command of a probe is answered with all that libvirt needs of it, or refused with the class it expects."""
    phase = "probe" if accel == "kvm:tcg" else "probe-tcg"
    rows = [row for row in PROBE if row["phase"] == phase and libvirt in row["libvirt"] and "send" in row][1:]
    with Process("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", f"none,accel={accel}") as process, \
            process.client() as client:
        known = {entry["name"] for entry in client.execute("query-commands")}
        for row in rows:
            if row["send"]["execute"] == "query-accelerators" and "query-accelerators" not in known:
                continue  # asked only where it is listed
            reply = replies(client, row["send"])
            if "error" in row["answer"] and row["send"].get("arguments", {}).get("typename") != "virtio-balloon-pci":
                assert reply["error"]["class"] == row["answer"]["error"]["class"]
            elif "return" in row["answer"] and row["send"]["execute"] != "query-qmp-schema":
                assert_covers(row["answer"]["return"], reply["return"], row["send"]["execute"])
        schema = {entry["name"]: entry for entry in client.execute("query-qmp-schema")}
        tag = schema[schema["object-add"]["arg-type"]]["members"][0]
        assert tag["name"] == "qom-type"
        assert "secret" in schema[tag["type"]]["values"]
        names = {entry["name"] for entry in client.execute("qom-list-types")}
        assert {"tcg-accel", "kvm-accel", "memory-backend-memfd", "pc-dimm", "thread-context"} <= names


@pytest.mark.parametrize("libvirt", ["9.0", "12.8"])
def test_life_with_smallest_answers(libvirt: str, tmp_path: Path) -> None:
    """Start, plug, unplug, suspend, resume, reconnect: answers cover the smallest ones, events come in their place."""
    rows = [row for row in PROBE if libvirt in row["libvirt"] and "send" in row and "probe" not in row["phase"]]
    with emulator(COMMAND_LINES[1], tmp_path) as (process, client):
        connected = {"start": client}
        for phase, phase_rows in groupby(rows, key=lambda row: row["phase"]):
            if phase == "reconnect":  # libvirt was restarted
                client.close()
                client = connected["reconnect"] = Client(tmp_path / "monitor.sock", timeout=PATIENCE)
            for row in list(phase_rows)[1 if phase in connected else 0:]:  # the client has negotiated
                step(client, row)
        client.close()
        assert process.process.poll() is None


def step(client: Client, row: dict[str, Any]) -> None:
    """One recorded command."""
    client.take_events()
    reply = replies(client, row["send"])
    assert_covers(row["answer"]["return"], reply["return"], row["send"]["execute"])
    assert [event["event"] for event in client.events] == [event["event"] for event in row.get("events_before", [])]
    for event in row.get("events_after", []):
        assert client.wait_event(event["event"], 5)["data"] == event["data"]


# -- dialogues with real QEMU

# What a machine without a guest does otherwise than the recorded one.
NO_MIGRATION = {"migrate", "migrate-set-parameters"}
OF_7_2 = '{"capability": "compress", "state": false}, '  # libvirt names only what is listed


def exchanges(first: int, last: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of libvirt's commands and the replies to them in a part of the recording."""
    waiting: dict[str, dict[str, Any]] = {}
    for row in DIALOGUE:
        message = row.get("message", {})
        if first <= row["n"] <= last and "id" in message:
            if row["from"] == "libvirt":
                waiting[message["id"]] = row
            else:
                yield waiting.pop(message["id"]), row


# Up to where the first recording ends.
PARTS = {"libvirt 9.0, QEMU 7.2": (1, 117), "libvirt 12.8, QEMU 11.1": (122, 180)}


@pytest.mark.parametrize(("line", "last"), PARTS.values(), ids=PARTS)
def test_dialogue(line: int, last: int, tmp_path: Path) -> None:
    """Each command of a recorded life is answered or refused as QEMU did it, with equal memory devices."""
    row = COMMAND_LINES[line]
    if line == 1:  # the domain had libvirt's default balloon, which its command line was recorded without
        row = row | {"argv": [*row["argv"], "-device", "virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x2"]}
    with emulator(row, tmp_path) as (_, client):
        for asked, answered in list(exchanges(line, last))[1:]:
            say(client, asked, answered["message"], tmp_path)


def say(client: Client, asked: dict[str, Any], recorded: dict[str, Any], folder: Path) -> None:
    """Send a recorded command and compare the reply with the recorded one."""
    command = asked["message"]["execute"]
    if command in NO_MIGRATION:
        assert replies(client, asked["message"])["error"]["class"] == "CommandNotFound"
        return
    text = json.dumps(asked["message"]).replace("/var/lib/libvirt/images", str(folder))
    text = text.replace(OF_7_2, "")
    [reply] = client.send_text(text.encode() + b"\r\n", 1, fds=[client.fileno()] * asked.get("fds", 0))
    assert reply["id"] == recorded["id"]
    assert reply.keys() == recorded.keys(), (asked, reply)
    if "error" in recorded:
        assert reply["error"]["class"] == recorded["error"]["class"]
        assert reply["error"]["desc"] == recorded["error"]["desc"]
    elif command == "query-memory-devices":
        assert reply["return"] == recorded["return"]
    elif command == "qom-list" and asked["message"]["arguments"]["path"] == "/machine/peripheral":
        names = {entry["name"] for entry in reply["return"]}
        assert {entry["name"] for entry in recorded["return"]} - names <= {"dimm0"}  # a guest of QEMU's kept it
    elif command == "query-memdev":
        recorded_ids = sorted(entry["id"] for entry in recorded["return"])
        assert sorted(entry["id"] for entry in reply["return"]) == recorded_ids

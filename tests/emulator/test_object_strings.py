"""Every object string that libvirt writes is accepted or refused as QEMU 11.1 did it (data/object-strings.jsonl)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.schema.keyval import parse_object
from tests.commands import conftest as commands
from tests.emulator.conftest import MIB, Machine

DATA = Path(__file__).parent / "data"
RECORDED = "11.1.3"
CASES = [json.loads(line) for line in (DATA / "object-strings.jsonl").read_text().splitlines()]


class Reserve:
    """A kernel that allocates nothing in advance: some of these objects are larger than the host."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def populate(self, *_arguments: Any, **_options: Any) -> None:
        """Leave the pages to their first use."""


class Daemon:
    """The daemon, which has no machine."""

    def __init__(self) -> None:
        self._machine = commands.Machine("auto")
        self.gmemd = self._machine.gmemd

    async def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        """The result of a command."""
        result = self._machine.begin(command, arguments)
        return await result if asyncio.iscoroutine(result) else result

    def close(self) -> None:
        """Give the memory back."""
        self.gmemd.close()


async def emulator() -> Machine:
    return await Machine("-machine", "none").start()


async def daemon() -> Daemon:
    return Daemon()


async def verdict(machine: Machine | Daemon, text: str) -> str | None:
    """The refusal of an object string of a command line; None: it was accepted."""
    try:
        await machine.execute("object-add", parse_object(text, machine.gmemd.schema))
    except QmpError as exc:
        return exc.desc
    return None


@pytest.mark.parametrize("start", [emulator, daemon])
@pytest.mark.parametrize("case", CASES, ids=[str(case["n"]) for case in CASES])
async def test_object_string(case: dict[str, Any], start: Callable[[], Awaitable[Machine | Daemon]],
                             tmp_path: Path) -> None:
    """As recorded: accepted, with the same query-memdev; refused by the host with its sentence; refused."""
    machine = await start()
    machine.gmemd.kernel = Reserve(machine.gmemd.kernel)  # type: ignore[assignment]
    (tmp_path / "nvdimm").touch()
    recorded = case["qemu"][RECORDED]
    small = "too small" in recorded.get("error", "")
    (tmp_path / "nvdimm").write_bytes(b"")
    if small or recorded["verdict"] == "accepted":
        with (tmp_path / "nvdimm").open("r+b") as file:
            file.truncate(512 * MIB)
    text = case["object"].replace("/tmp/", f"{tmp_path}/")
    try:
        if "after" in case:
            await machine.execute("object-add", case["after"])
        error = await verdict(machine, text)
        if recorded["verdict"] == "accepted":
            assert error is None
            expected = [recorded["memdev"]] if recorded.get("memdev") else []
            assert json.loads(await machine.execute("query-memdev", {})) == expected
        elif recorded["verdict"] == "host":
            assert error in (None, recorded["error"])  # None: this host has what that one lacked
            assert error is not None or "huge" not in recorded["error"]
        else:
            assert error is not None
    finally:
        machine.close()

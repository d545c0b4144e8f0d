"""A sparse object of 1 TiB with ten thousand ranges: it costs little memory, and its list is paged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

from gmemd.objects.records import backend_of, record_of
from gmemd.persist.record import record_of as record_of_row
from gmemd.persist.record import row_of
from tests.commands.conftest import Machine

PAGE = os.sysconf("SC_PAGESIZE")
TIB = 1 << 40
COUNT = 10_000


def scattered() -> list[int]:
    """The offsets of 10,000 pages of which no two are neighbours."""
    return [2 * PAGE * place for place in Random(4).sample(range(TIB // PAGE // 2), COUNT)]


def own_memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def convert_all(machine: Machine) -> None:
    machine.run("object-add", qom_type="memory-backend-guest-memfd", id="g", size=TIB)
    for offset in scattered():
        machine.execute("memdev-convert", {"id": "g", "offset": offset, "size": PAGE, "to": "private"})
        machine.events.clear()


def test_ten_thousand_conversions_of_a_tebibyte() -> None:
    """They take less than 10 MiB, allocate no page, and are all there, also part by part."""
    machine = Machine("simulated:in-place")
    machine.run("query-memdev-accounting")
    before = own_memory()
    convert_all(machine)
    assert own_memory() - before < 10 << 20
    assert machine.gmemd.kernel.resident(machine.gmemd.objects.find("g").fd) == 0
    offsets = sorted(scattered())
    listed = json.loads(machine.run("query-memdev-ranges", id="g"))
    assert listed["private"] == COUNT * PAGE
    assert [entry["offset"] for entry in listed["ranges"] if entry["visibility"] == "private"] == offsets
    parts: list[dict[str, Any]] = []
    for offset in range(0, TIB, TIB // 16):
        answer = machine.run("query-memdev-ranges", id="g", offset=offset, size=TIB // 16)
        parts += json.loads(answer)["ranges"]
    assert [entry["offset"] for entry in parts if entry["visibility"] == "private"] == offsets
    assert sum(entry["size"] for entry in parts) == TIB
    machine.gmemd.close()


def test_its_record_is_some_hundred_kilobytes() -> None:
    """What a restart needs to know of it; it makes the same map again."""
    machine = Machine("simulated:in-place")
    convert_all(machine)
    backend = machine.gmemd.objects.find("g")
    row = row_of(record_of(backend, machine.gmemd.kernel))
    assert len(json.dumps(row)) < 400_000
    again = backend_of(record_of_row(row), os.dup(backend.fd), machine.gmemd.schema)
    assert again.visibility is not None
    assert backend.visibility is not None
    assert again.visibility.dump() == backend.visibility.dump()
    again.close()
    machine.gmemd.close()

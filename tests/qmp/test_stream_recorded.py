"""The errors of reading that QEMU 11.1 sent, from the recorded dialogues of tests/conformance."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.cases import RECORDED, load
from tests.conformance.replay import NEGOTIATE, recorded_lines
from tests.qmp.streams import cut, read, single_bytes


def sent(step: dict[str, Any]) -> bytes:
    if "hex" in step:
        return bytes.fromhex(step["hex"])
    if "gen" in step:
        return "".join(text * times for text, times in step["gen"]).encode()
    text = str(step["text"]).replace("@DIR@", "/tmp/qmpc.xxxxxxxx")  # columns count its length
    return text.replace("@FD0@", "10").replace("@FD1@", "11").encode()


def reported(case: dict[str, Any], step: dict[str, Any]) -> Iterator[str]:
    """The descs that are the reader's among the recorded answers of a step."""
    lines = recorded_lines(step)
    for line in ["".join(lines)] if "pretty" in step.get("norm", ()) else lines:
        desc = json.loads(line).get("error", {}).get("desc", "") if "error" in line else ""
        if "JSON parse error, " in desc or (desc.startswith("JSON ") and desc.endswith(" limit exceeded")):
            yield desc


def inputs_and_errors(case: dict[str, Any]) -> Iterator[tuple[list[bytes], list[str]]]:
    """For each connection of a case the bytes it sent and the errors it got."""
    if case["start"] == "none":
        connections: dict[int, tuple[list[bytes], list[str]]] = {}
    else:
        connections = {0: ([NEGOTIATE[case["start"]]] if case["start"] in NEGOTIATE else [], [])}
    for step in case["steps"]:
        number = step.get("c", 0)
        if step.get("do", "send") == "open":
            if number in connections:
                yield connections[number]
            connections[number] = ([], [])
        if step.get("do", "send") == "send":
            connections[number][0].append(sent(step))
        if step.get("do", "send") in ("send", "read") and step.get("recv"):
            connections[number][1].extend(reported(case, step))
    yield from connections.values()


def recorded_cases() -> list[Any]:
    cases = [case for name in RECORDED for case in load(name)
             if not case["case"].startswith("limits/tokens")]  # too much under coverage; the daemon gets them
    return [pytest.param(case, id=case["case"], marks=[pytest.mark.slow] if case.get("slow") else []) for case in cases]


@pytest.mark.parametrize("case", recorded_cases())
def test_recorded_errors_come_again(case: dict[str, Any]) -> None:
    """The errors QEMU 11.1 sent come in the same order and words, whole, by bytes and in random pieces."""
    dice = random.Random(case["case"])
    for steps, errors in inputs_and_errors(case):
        data = b"".join(steps)
        pieces = cut(data, [dice.randrange(len(data) + 1) for _ in range(dice.randrange(9))])
        feeds = [pieces] if case.get("slow") else [steps, [data], pieces, list(single_bytes(data))]
        for feed in feeds:
            assert errors == [value[1:] for value in read(*feed) if isinstance(value, str) and value[:1] == "!"]

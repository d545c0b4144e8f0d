"""The QEMU of this host and gmemd are asked the same and answer the same, here and now.

Older QEMUs answer some cases otherwise than the recorded 11.1; these are left out, by the table below.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import partial

import pytest

from tests.conformance.cases import own_cases, replayed
from tests.conformance.compare import normal
from tests.conformance.replay import Case, Replay, Result
from tests.conformance.servers import QEMU, Servers, start_gmemd, start_qemu

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not shutil.which(QEMU), reason=f"needs {QEMU} (Debian package qemu-system-x86)"),
]

OLDER = {  # what changed between QEMU 7.2 and 11.1, and the cases that show it
    "memory-backend-shm is of 9.1": [
        "shm/*", "mix/shm-*", "precedence/shm-*", "qom-get/shm-*", "qom-set/shm-*", "qom-list/shm",
        "qom-types/backend-types*"],
    "offset is of 8.1, rom of 8.2": [
        "file/offset*", "file/rom-*", "object-add/offset-str", "object-add/rom-bad", "mix/file-00",
        "mix/file-06", "mix/file-19", "qom-get/file-rom", "qom-set/file-rom", "qom-set/file-offset*"],
    "the texts about the size of a backing store name the object since 8.1": [
        "memfd/size-4097", "memfd/size-1", "precedence/memfd-unaligned-policy", "file/readonly-smaller"],
    "a file of no whole pages is refused since 11.1": ["file/size-4097"],
    "a removed fd is gone at once since 9.1": ["fds/remove-one"],
    "/objects exists from the start since 11.1": ["qom-list/fresh-after-schema-error"],
    "query-status has lost singlestep in 9.0": ["pretty/basic"],
    "the JSON parser of 11.1 judges each token as it comes, in its own words": [
        "json/mismatch", "json/mismatch3", "json/no-colon", "json/trailing-comma-object",
        "json/object-no-comma", "json/bare-key", "json/null-key", "frame/unclosed-then-cmd",
        "frame/trailing-comma-nl-good", "frame/mismatch-nl-good", "frame/mismatch-deep-nl-good",
        "frame/partial-2", "frame/positions-multi", "limits/nest-1025-array*", "limits/nest-then-escape",
        "limits/tokens-2M",
        *(f"fuzz/{number:02}" for number in (1, 2, 9, 11, 16, 18, 19, 20, 26, 39, 47, 53, 54, 58, 61, 67, 72,
                                             75, 77, 81, 83))],
}
# 11.1 tells the position of a parse error; "singlestep" went away
NEWER_ONLY = re.compile(r'(?<=")\d+:\d+: (?=JSON parse error)|"singlestep": (?:true|false), ')


def _cases() -> Iterator[object]:
    otherwise = [pattern for patterns in OLDER.values() for pattern in patterns]
    for case in replayed("qmp-11.1.jsonl"):
        name = case["case"]
        differs = name in own_cases() or any(fnmatchcase(name, pattern) for pattern in otherwise)
        if not differs and not case.get("slow"):
            yield pytest.param(case, id=name)


@pytest.fixture(scope="module")
def both() -> Iterator[list[Servers]]:
    both = [Servers(start_qemu), Servers(partial(start_gmemd, measured=False))]
    yield both
    for servers in both:
        servers.close()


@pytest.mark.parametrize("case", [*_cases()])
def test_answers_as_qemu_does(case: Case, both: list[Servers]) -> None:
    """QEMU and gmemd give the same answers to the same dialogue."""
    qemu, gmemd = (_answers(case, servers) for servers in both)
    assert qemu == gmemd


def _answers(case: Case, servers: Servers) -> list[object]:
    server = servers.take(case, "auto")
    try:
        results = Replay(server, case).run()
    finally:
        servers.give_back(server)
    numbers: dict[str, str] = {}
    answers: list[object] = []
    for step, result in zip(case["steps"], results, strict=True):
        lines = [NEWER_ONLY.sub("", line) for line in result.lines]
        answers.append(normal(step, Result(lines, result.closed, result.value), numbers, ordered=False))
    return answers


def test_each_exception_names_a_case() -> None:
    """Every pattern of the table of older QEMUs matches a recorded case."""
    names = [case["case"] for case in replayed("qmp-11.1.jsonl")]
    patterns = [pattern for patterns in OLDER.values() for pattern in patterns]
    assert [p for p in patterns if not any(fnmatchcase(name, p) for name in names)] == []

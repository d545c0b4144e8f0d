"""What QEMU answered, gmemd answers: every recorded case, byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.conformance.cases import RECORDED, own_cases, replayed, unmet_need
from tests.conformance.compare import differences
from tests.conformance.replay import Case, Replay
from tests.conformance.servers import Servers, start_gmemd

DOC = Path(__file__).parents[2] / "docs" / "differences.md"


def _parameters() -> Iterator[object]:
    """Each case on the kernel that gmemd chooses; the cases about guest_memfd also on the simulated one."""
    for corpus in RECORDED:
        for case in replayed(corpus):
            marks = [pytest.mark.slow] if case.get("slow") else []
            yield pytest.param(case, "auto", id=case["case"], marks=marks)
            if case["profile"] == "11.2":
                yield pytest.param(case, "simulated", id=f"{case['case']}-simulated", marks=marks)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[bool, Servers]]:
    """Servers under coverage, and others for millions of tokens."""
    servers = {measured: Servers(partial(start_gmemd, measured=measured)) for measured in (True, False)}
    yield servers
    for some in servers.values():
        some.close()


@pytest.mark.parametrize(("case", "kernel"), [*_parameters()])
def test_answers_as_recorded(case: Case, kernel: str, servers: dict[bool, Servers]) -> None:
    """The answers to a recorded dialogue are the recorded bytes, and no descriptor stays behind."""
    lack = unmet_need(case)
    if lack:
        pytest.skip(lack)
    some = servers[not case["case"].startswith("limits/")]
    server = some.take(case, kernel)
    try:
        before = server.open_fds()
        found = list(differences(case, Replay(server, case).run()))
        assert not found, "\n".join([*found, server.log()[-2000:]])
        if case["server"] == "any":
            assert server.settled_fds(before) <= before
    finally:
        some.give_back(server)


def test_differences_are_documented() -> None:
    """docs/differences.md names exactly the cases in which gmemd answers otherwise."""
    named = set(re.findall(r"`([a-z0-9-]+/[a-z0-9-]+)`", DOC.read_text()))
    assert named == set(own_cases())

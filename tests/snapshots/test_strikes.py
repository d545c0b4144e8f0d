"""Whole or absent, wherever it is struck: a sample of `script/robustness snapshots`, which strikes every call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.robustness.tracer import CAN_FAIL, why_not
from tests.snapshots.strikes import ACTS, ERRORS, sweep_all

SAMPLE = {"save": 43, "increment": 47, "restore": 41, "verify": 41, "flatten": 61, "cold": 61, "remove": 6, "sweep": 11}

_WHY_NOT = why_not() or ("" if CAN_FAIL else "makes system calls fail on x86-64 only")


@pytest.mark.skipif(bool(_WHY_NOT), reason=f"needs ptrace: {_WHY_NOT}")
@pytest.mark.parametrize("errors", [(), ERRORS], ids=["killed", "failing"])
@pytest.mark.parametrize("name", SAMPLE)
def test_whole_or_absent(tmp_path: Path, name: str, errors: tuple[int, ...],
                         record_property: Callable[[str, object], None]) -> None:
    """After SIGKILL or an error at a call a snapshot is whole or absent, and the object is as it was."""
    tally = sweep_all(tmp_path / "act", ACTS[name], step=SAMPLE[name], errors=errors)
    record_property("figure", f"{name}: {sum(tally.calls.values())} points, {dict(tally.results)}")
    assert sum(tally.calls.values()) > 1

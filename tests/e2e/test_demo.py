"""`gmemd demo` tells the truth, and cleans up after itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import state
from tests.programs import output

pytestmark = pytest.mark.e2e
QEMU = "real" if shutil.which("qemu-system-x86_64") else "not"  # what the last step says
DEMO = [sys.executable, "-m", "gmemd", "demo"]


def truths(told: str) -> list[str]:
    """What stands in brackets behind each step, up to the colon."""
    return re.findall(r"^   \[([a-z]+)", told, re.MULTILINE)


def test_simulated(tmp_path: Path) -> None:
    """All eight steps, each with what is real; no process and no file is left."""
    told = output([*DEMO, "--kernel", "simulated"], env={**os.environ, "TMPDIR": str(tmp_path)})
    assert re.findall(r"^(\d)\. ", told, re.MULTILINE) == list("12345678")
    assert truths(told)[1] == "simulated"
    assert truths(told)[5] == "simulated"
    assert "guest loaded into the memory, counter 0" in told
    assert re.search(r"guest found in the memory, counter [1-9]\d*$", told, re.MULTILINE)
    assert "1048576 bytes next to the guest became private (they read as zero)" in told
    assert truths(told)[7] == QEMU
    if QEMU == "real":
        assert "has the guest, started only once; it counts on" in told
        told, _, moved = told.partition("\n8. ")
        before, after = map(int, re.findall(r"(\d+) \.\.\. (\d+)", moved)[0])
        assert after > before > 0
        assert all(state(int(pid)) in "ZX" for pid in re.findall(r"process (\d+)", moved))
    counts = [int(number) for found in re.findall(r"(\d+) \.\.\. (\d+)", told) for number in found]
    assert counts == sorted(counts), "the guest never began again"
    assert all(state(int(pid)) in "ZX" for pid in re.findall(r"process (\d+)", told))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kvm
def test_real() -> None:
    """With KVM, only the conversion is not the kernel's."""
    told = output([*DEMO, "--kernel", "kvm"])
    assert truths(told) == ["real", "real", "real", "real", "real", "simulated", "real", QEMU]


def test_stay(tmp_path: Path) -> None:
    """With --stay gmemd goes on with its object, until it is told to end."""
    told = output([*DEMO, "--kernel", "simulated", "--stay"], env={**os.environ, "TMPDIR": str(tmp_path)})
    pid = int(re.findall(r"To end it: kill (\d+)", told)[0])
    try:
        with Client(re.findall(r"export GMEMD_SOCKET=(\S+)", told)[0]) as client:
            assert [memdev["id"] for memdev in client.execute("query-memdev")] == ["gm0"]
    finally:
        os.kill(pid, signal.SIGTERM)

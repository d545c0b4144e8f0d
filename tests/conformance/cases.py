"""The cases to replay: QEMU's recorded answers, and our own where gmemd answers otherwise on purpose.

The files of RECORDED were recorded from QEMU and stay as they are; a case replaces that of its name in an earlier one.
A case of `gmemd.jsonl` replaces the recorded case of its name; docs/differences.md gives the reason for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.conformance.replay import Case

HERE = Path(__file__).parent
RECORDED = ("qmp-11.1.jsonl", "qmp-11.1.3.jsonl", "qmp-guest-memfd-11.2.jsonl")
OWN = "gmemd.jsonl"


def load(name: str) -> Iterator[Case]:
    """Read the cases of one corpus file."""
    with (HERE / name).open() as lines:
        for line in lines:
            case = json.loads(line)
            if "case" in case:
                yield case


@cache
def own_cases() -> dict[str, Case]:
    """Give the cases in which gmemd differs from QEMU on purpose, by name."""
    return {case["case"]: case for case in load(OWN)}


def replayed(name: str) -> list[Case]:
    """Give the cases of a recorded corpus that no later one replaces, with ours in the place of those we differ in."""
    replaced = {case["case"] for later in RECORDED[RECORDED.index(name) + 1:] for case in load(later)}
    return [own_cases().get(case["case"], case) for case in load(name) if case["case"] not in replaced]


def unmet_need(case: Case) -> str | None:
    """Say what this host lacks for a case to come out as recorded; None if nothing."""
    for need in case.get("needs", ()):
        reason = _lack(need)
        if reason:
            return reason
    return None


@cache
def _lack(need: str) -> str | None:
    match need:
        case "one-node":
            online = Path("/sys/devices/system/node/online")
            alone = not online.exists() or online.read_text().strip() == "0"
            return None if alone else "needs a host of one NUMA node"
        case "no-hugepages":
            pools = Path("/sys/kernel/mm/hugepages").glob("*/nr_hugepages")
            none = all(pool.read_text().strip() == "0" for pool in pools)
            return None if none else "needs a host without huge pages"
        case "cpu-0":
            return None if 0 in os.sched_getaffinity(0) else "needs to run on CPU 0, too"
        case "overcommit":
            return None if _overcommits() else "needs vm.overcommit_memory 0 and less than 512 GiB"
        case "kvm-guest-memfd":  # the simulated kernel answers the same
            return None
    raise AssertionError(f"unknown need {need!r}")


def _overcommits() -> bool:
    totals = [int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
              if line.startswith(("MemTotal:", "SwapTotal:"))]  # KiB
    mode = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    return mode == "0" and sum(totals) < 512 << 20

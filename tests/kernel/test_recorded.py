"""What kernels have answered (recorded/KERNEL.json) against their simulations, and against this machine's kernel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gmemd.kernel.linux import why_not_shared
from gmemd.kernel.profiles import PROFILES
from gmemd.kernel.simulated import SimulatedKernel
from tests.kernel.questions import ASKED, ask
from tests.kernel.record import record
from tests.kernel.slots import ASKED_OF_LINUX
from tests.kernel.test_contract import ELSEWHERE

RECORDED = {path.stem: json.loads(path.read_text())
            for path in sorted(Path(__file__).with_name("recorded").glob("*.json"))}

each = pytest.mark.parametrize("name", RECORDED)


def profile_of(name: str) -> str:
    return name.partition("+")[0]


@each
def test_the_simulation_answers_as_the_kernel_did(name: str) -> None:
    """Item by item; what a stand-in cannot show has its reason."""
    kernel = SimulatedKernel(PROFILES[profile_of(name)])
    answers = dict(RECORDED[name]["answers"])
    for items, question in ASKED.items():
        assert answers.pop(key(items)) == ask(kernel, question), items
    for items in ASKED_OF_LINUX:
        assert answers.pop(key(items))
        assert all("simulated" in ELSEWHERE[item] for item in items)
    assert answers == {}


def key(items: tuple[int, ...]) -> str:
    return ", ".join(map(str, items))


@each
def test_a_profile_is_what_the_kernel_offered(name: str) -> None:
    """Capabilities, creation, mapping, allocation, link, magic, policy, binding, conversion."""
    found = SimulatedKernel(PROFILES[profile_of(name)]).probe()
    if not RECORDED[name]["host"]["nested paging"]:
        found["PRE_FAULT_MEMORY"] = 0  # it fills the second level of page tables
    assert RECORDED[name]["probe"] == found


@each
def test_a_recording_is_of_the_kernel_that_it_names(name: str) -> None:
    assert RECORDED[name]["kernel"].startswith(f"{profile_of(name)}.")


@each
def test_a_kernel_is_used_from_6_18_on(name: str) -> None:
    """Linux 6.12 has guest_memfd, for other types of VM, and lacks the flag."""
    recorded, version = RECORDED[name], tuple(map(int, profile_of(name).split(".")))
    why = why_not_shared(recorded["device"]["GUEST_MEMFD"], recorded["probe"]["GUEST_MEMFD_FLAGS"])
    assert why == (None if version >= (6, 18) else "guest_memfd lacks the flag MMAP (Linux 6.18 has it)")


def test_every_item_is_asked_for() -> None:
    """Each once."""
    assert sorted(item for items in (*ASKED, *ASKED_OF_LINUX) for item in items) == list(range(1, 70))


@pytest.mark.kvm
def test_this_kernel_answers_as_recorded() -> None:
    """What the recording of this release says, on a host alike, is what happens here."""
    now = record()
    like: dict[str, Any] | None = next(
        (past for name, past in RECORDED.items() if os.uname().release.startswith(f"{profile_of(name)}.")
         and (past["machine"], past["host"]) == (now["machine"], now["host"])), None)
    if like is None:
        pytest.skip(f"needs a recording of Linux {os.uname().release} on a host like {now['host']}")
    assert without_origin(now) == without_origin(like)


def without_origin(recorded: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recorded.items() if name not in ("kernel", "date")}

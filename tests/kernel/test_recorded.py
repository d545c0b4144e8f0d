"""What kernels have answered (recorded/KERNEL.json) against their simulations, and against this machine's kernel."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gmemd.kernel.linux import Unsupported, why_not_shared
from gmemd.kernel.profiles import PROFILES
from gmemd.kernel.simulated import SimulatedKernel
from gmemd.vmm.memfds import names_guest_memfd
from tests.kernel.questions import ASKED, ask
from tests.kernel.record import record
from tests.kernel.slots import ASKED_OF_LINUX
from tests.kernel.test_contract import ELSEWHERE

RECORDED = {path.stem: json.loads(path.read_text())
            for path in sorted(Path(__file__).with_name("recorded").glob("*.json"))}

each = pytest.mark.parametrize("name", RECORDED)


def profile_of(name: str) -> str:
    return name.partition("+")[0]


def version_of(name: str) -> tuple[int, ...]:
    return tuple(map(int, profile_of(name).split(".")))


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
    recorded = RECORDED[name]
    why = why_not_shared(recorded["device"]["GUEST_MEMFD"], recorded["probe"]["GUEST_MEMFD_FLAGS"])
    assert why == (None if version_of(name) >= (6, 18) else "guest_memfd lacks the flag MMAP (Linux 6.18 has it)")


def test_every_item_is_asked_for() -> None:
    """Each once."""
    assert sorted(item for items in (*ASKED, *ASKED_OF_LINUX) for item in items) == list(range(1, 70))


@each
def test_a_guest_memfd_is_recognised_in_other_processes(name: str) -> None:
    assert names_guest_memfd(RECORDED[name]["probe"]["link"])


@each
def test_a_userfaultfd_registers_as_gmemd_takes_it(name: str) -> None:
    """A mode is added to those in force by registering for all; alone it drops them, or is refused where it would drop
    protection. RWP is new in Linux 7.3. A guest_memfd has no missing pages (a move says so)."""
    recorded, new = RECORDED[name]["userfaultfd"], version_of(name) >= (7, 3)
    for how in ("synchronous", "asynchronous"):
        memfd = recorded[f"memfd, {how}"]
        assert memfd["WP, then both"] == memfd["both, then WP"] == "OK, OK [um, uw]"
        assert memfd["WP, then MISSING"] == ("OK, EBUSY [uw]" if new else "OK, OK [um]")
        assert memfd["RWP"] == ("OK [ur]" if new else "EINVAL []")
        for kind in ("guest_memfd", "without INIT_SHARED"):
            assert recorded[f"{kind}, {how}"].get("MISSING", "EINVAL []") == "EINVAL []"
    assert int(recorded["features"], 16) == (0x7FFFF if new else 0x1FFFF)


def test_this_kernel_answers_as_recorded() -> None:
    """What the recording of this release says, on a host alike, is what happens here."""
    try:
        now = record()
    except (Unsupported, PermissionError) as exc:
        pytest.skip(f"needs KVM and a userfaultfd: {exc}")
    release = os.uname().release
    like = [past for name, past in RECORDED.items() if release.startswith(f"{profile_of(name)}.")
            and (past["machine"], past["host"]) == (now["machine"], now["host"])]
    if not like:
        pytest.skip(f"needs a recording of Linux {release} on a host like {now['host']}")
    assert without_origin(now) in map(without_origin, like)


def without_origin(recorded: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recorded.items() if name not in ("kernel", "date")}

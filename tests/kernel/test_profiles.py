"""Each profile of the simulation is what its table says; what real kernels answered, test_recorded.py compares."""

from __future__ import annotations

import errno
import os

import pytest

from gmemd.kernel import uapi
from gmemd.kernel.profiles import PROFILES
from gmemd.kernel.rules import PAGE_SIZE
from gmemd.kernel.simulated import SimulatedKernel
from tests.kernel.host import errno_of

# What a client sees of each: legal flags, GUEST_MEMFD and GUEST_MEMFD_FLAGS capabilities, then the outcome of
# making a file with no flag, MMAP | INIT_SHARED, and the next bit; of mapping the first two; of converting.
SEEN: dict[str, tuple[int | str | None, ...]] = {
    "6.12": (0, 0, 0, "OK", "EINVAL", "EINVAL", "ENODEV", None, "ENOTTY"),
    "6.18": (3, 1, 3, "OK", "OK", "EINVAL", "ENODEV", "OK", "ENOTTY"),
    "7.2": (3, 1, 3, "OK", "OK", "EINVAL", "ENODEV", "OK", "ENOTTY"),
    "7.3": (3, 1, 3, "OK", "OK", "EINVAL", "ENODEV", "OK", "ENOTTY"),
    "in-place": (3, 1, 3, "OK", "OK", "EINVAL", "ENODEV", "OK", "OK"),
    "no-guest-memfd": (None, 0, 0, "ENOTTY", "ENOTTY", "ENOTTY", None, None, None),
    "no-direct-map": (7, 1, 7, "OK", "OK", "OK", "ENODEV", "OK", "ENOTTY"),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_profile_is_what_a_client_sees(name: str) -> None:
    """The probe of a simulated kernel gives the profile's own answers."""
    kernel = SimulatedKernel(PROFILES[name])
    found = kernel.probe()
    seen = (
        kernel.guest_memfd_flags,
        found["GUEST_MEMFD"],
        found["GUEST_MEMFD_FLAGS"],
        found["create flags=0"],
        found["create flags=3"],
        found["create flags=4"],
        found.get("map shared flags=0"),
        found.get("map shared flags=3"),
        found.get("convert"),
    )
    assert seen == SEEN[name]


def test_every_profile_is_tested() -> None:
    """The table above names each profile."""
    assert set(SEEN) == set(PROFILES)


def test_a_profile_without_guest_memfd_still_makes_memory() -> None:
    """Only guest_memfd is missing."""
    kernel = SimulatedKernel(PROFILES["no-guest-memfd"])
    assert errno_of(kernel.create_guest_memfd, PAGE_SIZE, 0) == errno.ENOTTY
    fd = kernel.memfd_create("ordinary", 0)
    kernel.truncate(fd, PAGE_SIZE)
    kernel.allocate(fd, 0, PAGE_SIZE)
    resident = kernel.resident(fd)
    os.close(fd)
    assert resident == PAGE_SIZE


@pytest.mark.parametrize("name", ["6.18", "7.2"])
def test_only_newer_kernels_keep_a_policy(name: str) -> None:
    """The answer decides how an object is placed: by its file, or by the threads that populate it."""
    assert SimulatedKernel(PROFILES[name]).shared_policy == (name == "7.2")


def test_the_proposed_flag_is_remembered() -> None:
    """A file made with NO_DIRECT_MAP is a file like the others, and its flags can be read from it."""
    kernel = SimulatedKernel(PROFILES["no-direct-map"])
    flags = 3 | uapi.GUEST_MEMFD_FLAG_NO_DIRECT_MAP
    fd = kernel.create_guest_memfd(PAGE_SIZE, flags)
    kernel.try_map(fd, PAGE_SIZE, reserve=True)
    link = os.readlink(f"/proc/self/fd/{fd}")
    os.close(fd)
    assert link == f"/memfd:gmemd-guest-memfd:{flags} (deleted)"

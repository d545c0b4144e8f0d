"""A system call that fails is told, undone, and forgotten: a sample of script/robustness."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.robustness.scenarios import BY_NAME
from tests.robustness.sweep import Sweep, errors
from tests.robustness.tracer import FIRST
from tests.robustness.world import World

SAMPLE = {  # every so many points
    "object-add memfd": 7,
    "object-add file, made": 11,
    "object-add file, unlinked": 17,
    "object-add guest-memfd, preallocated": 67,
    "object-del memfd": 7,
    "object-del guest-memfd with private bytes": 19,
    "qom-set merge": 7,
    "memdev-get-fd": 3,
    "memdev-get-fd, leased": 17,
    "getfd and memdev-adopt": 13,
    "memdev-convert to private": 17,
    "memdev-convert to shared": 13,
    "memdev-freeze": 7,
    "memdev-clone": 9,
    "transaction of all kinds": 67,
    "transaction that replaces": 31,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_an_error_is_told_and_nothing_has_happened(world: World, name: str,
                                                   record_property: Callable[[str, object], None]) -> None:
    """The reply is success or names the errno, the state is as it says, nothing leaks, the next command works."""
    tally = errors(world, BY_NAME[name], step=SAMPLE[name], first=1)

    assert tally.points > 1
    record_property("figure", f"{name}: {tally.points} errors, {tally.results['error']} told")


def test_a_thread_that_is_not_to_be_had_is_told(world: World) -> None:
    """The first of a preallocation, one without memory to begin with, the second: nothing is made, all else goes on."""
    sweep = Sweep(world, BY_NAME["object-add memfd by two threads"])
    try:
        for call in ("clone3", "mmap*", "clone3*"):
            assert sweep.fail_at(FIRST, errno.ENOMEM, only=call)
        assert sweep.tally.results == {"error": 3}
    finally:
        sweep.close()

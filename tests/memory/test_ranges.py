"""The range map, against a map of single bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd.memory.ranges import PRIVATE, SHARED, RangeMap

SIZE = 24
PART = st.integers(0, SIZE - 1).flatmap(lambda at: st.tuples(st.just(at), st.integers(1, SIZE - at)))


@given(st.booleans(), st.lists(st.tuples(PART, st.booleans())), PART)
def test_agrees_with_a_map_of_bytes(initial: bool, steps: list[tuple[tuple[int, int], bool]],
                                    part: tuple[int, int]) -> None:
    """After any conversions each byte has the state that was last given to it, and ranges are joined."""
    ranges, model = RangeMap(SIZE, initial), [initial] * SIZE
    for (offset, size), state in steps:
        ranges.set(offset, size, state)
        model[offset:offset + size] = [state] * size
    assert [ranges.at(offset) for offset in range(SIZE)] == model
    listed = list(ranges.ranges())
    assert [state for _, size, state in listed for _ in range(size)] == model
    assert all(one[2] != other[2] for one, other in pairwise(listed))
    assert len(ranges) == len(listed)
    assert ranges.total(PRIVATE) + ranges.total(SHARED) == SIZE
    assert ranges.total(PRIVATE) == sum(model)
    offset, size = part
    assert [state for _, length, state in ranges.ranges(offset, size) for _ in range(length)] == (
        model[offset:offset + size])
    assert list(RangeMap(SIZE, ranges.initial, ranges.dump()).ranges()) == listed


@pytest.mark.parametrize("dumped", [5, {}, [], [1], [True, 5], [True, 4096, 4096], [True, 8192, 4096], [False, -4096],
                                    [True, 1 << 20], [True, "4096"], [True, 4096.0], [True, True]], ids=str)
def test_what_is_no_map(dumped: object) -> None:
    """What somebody else has written is believed only if it can be a map."""
    assert RangeMap.of(1 << 20, dumped) is None


def test_a_map_that_somebody_else_has_written() -> None:
    found = RangeMap.of(1 << 20, [True, 4096, 8192])
    assert found is not None
    assert list(found.ranges()) == [(0, 4096, PRIVATE), (4096, 4096, SHARED), (8192, (1 << 20) - 8192, PRIVATE)]

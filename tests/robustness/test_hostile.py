"""A sample of the hostile suite: what script/robustness hostile and clock do at length, and what fuzzing has found."""

from __future__ import annotations

import asyncio
import os
import traceback

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gmemd.schema.validate import Schema
from tests.robustness.fuzz import Target, corpus, seeds
from tests.robustness.hostile import SMALL, suite, table
from tests.robustness.jumps import live

INPUTS = [*seeds(Schema.load()), *corpus()]
MIXES = st.lists(st.tuples(st.sampled_from(INPUTS), st.sampled_from(INPUTS), st.integers(0, 4095),
                           st.integers(0, 4095), st.binary(max_size=4)), min_size=100, max_size=100)


def test_hostile_clients_cost_nothing_that_stays() -> None:
    """Memory, descriptors and answers are as before; what they cost meanwhile is measured at length only."""
    rows = suite(SMALL, policy=os.geteuid() == 0)
    assert len(table(rows).splitlines()) == 2 + len(rows) == 6


def test_the_clock_jumps() -> None:
    """An hour and the pause: timers run out when their time is over, and events tell the time."""
    day = live(60)
    assert day.cut > 0
    assert day.seconds >= 7 * 3600


def attempt(inputs: list[bytes]) -> None:
    """Try them all, in a process of their own: what is begun and not awaited keeps its descriptors."""
    async def all_of_them() -> None:
        target = Target()
        for text in inputs:
            await target.once(text)
        assert target.messages > 0

    child = os.fork()
    if not child:
        try:
            asyncio.run(all_of_them())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_fuzzing_has_found() -> None:
    """Is answered, and so are the shortest inputs for each command."""
    attempt(INPUTS)


@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # to make 100 inputs fewer takes minutes
@given(MIXES)
def test_inputs_like_these(mixes: list[tuple[bytes, bytes, int, int, bytes]]) -> None:
    """The beginning of one, something else, and the end of another."""
    attempt([one[:begin % (len(one) + 1)] + between + other[end % (len(other) + 1):]
             for one, other, begin, end, between in mixes])

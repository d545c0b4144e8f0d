"""How old an object is, and when it was made: whatever is done to the clock, and over restarts of the daemon."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from gmemd.objects.records import backend_of, record_of
from gmemd.persist.record import Record
from gmemd.posix import boottime
from gmemd.web.process import process_metrics
from tests.commands.conftest import Machine

DAY = 86400
STEPS = [0, -DAY, 400 * DAY, -20_000 * DAY]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the wall clock."""
    clock = time.time

    def set_by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + seconds)

    return set_by


def age(machine: Machine) -> int:
    [status] = machine.run("query-memdev-status", id="m")
    return int(status["age"])


def make(machine: Machine, seconds_ago: int) -> None:
    machine.run("object-add", qom_type="memory-backend-memfd", id="m", size=4096)
    machine.gmemd.objects.find("m").made -= seconds_ago


def restarted(machine: Machine, record: Record) -> None:
    """As the next daemon makes the object from its record."""
    machine.gmemd.objects.restore([backend_of(record, machine.gmemd.objects.remove("m").fd, machine.gmemd.schema)])


@pytest.mark.parametrize("seconds", STEPS)
def test_a_step_of_the_clock_makes_nothing_older(machine: Machine, step: Callable[[float], None],
                                                 seconds: float) -> None:
    """The age is the time that has passed; the moment of its making is told by the clock as it is."""
    make(machine, 5)
    step(seconds)
    assert 5 <= age(machine) < 600
    told = boottime.on_the_wall(machine.gmemd.objects.find("m").made)
    assert 3 <= time.time() - told < 600


@pytest.mark.parametrize("seconds", STEPS)
def test_a_restart_makes_nothing_younger(machine: Machine, step: Callable[[float], None], seconds: float) -> None:
    """Also when the clock was set in between."""
    make(machine, 5)
    record = record_of(machine.gmemd.objects.find("m"), machine.gmemd.kernel)
    step(seconds)
    restarted(machine, record)
    assert 5 <= age(machine) < 600


def test_records_of_earlier_versions(machine: Machine) -> None:
    """They have the wall clock's word alone; nothing is older than the machine runs, or younger than now."""
    make(machine, 0)
    record = record_of(machine.gmemd.objects.find("m"), machine.gmemd.kernel)
    extra = {name: value for name, value in record.extra.items() if name != "made"}
    uptime = boottime.now()
    for created, least, most in ((time.time() - min(7, uptime / 2), min(4, uptime / 4), 600),
                                 (time.time() + DAY, 0, 600), (0, uptime - 5, uptime + 600)):
        restarted(machine, record.changed(extra=extra, created=int(created)))
        assert int(least) <= age(machine) <= most


def test_a_moment_of_another_boot(machine: Machine) -> None:
    """What has not yet been in this boot is not believed."""
    make(machine, 0)
    record = record_of(machine.gmemd.objects.find("m"), machine.gmemd.kernel)
    restarted(machine, record.changed(extra={**record.extra, "made": boottime.now() + DAY}))
    assert 0 <= age(machine) < 600


def test_adjusting_the_clock_does_not_show(step: Callable[[float], None]) -> None:
    """A second more or less is not a step: the answer stays the same, as a process's start time must."""
    told = boottime.on_the_wall(1.0)
    for seconds in (0.4, -0.4, 0.9, 0.0):
        step(seconds)
        assert boottime.on_the_wall(1.0) == told
    step(DAY)
    assert boottime.on_the_wall(1.0) == pytest.approx(told + DAY, abs=2)
    [started] = [family.samples[0].value for family in process_metrics() if family.name == "process_start_time_seconds"]
    assert 0 < time.time() - started < DAY

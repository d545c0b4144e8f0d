"""Each test begins with a socket that listens, no daemon and no memory."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.systemd.booted import service


@pytest.fixture(autouse=True)
def fresh_service() -> None:
    """Make all as after the boot."""
    service.reset()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the service had to say to the report of a failure."""
    report = yield
    if report.failed:
        report.sections.append(("journal of gmemd.service", service.journal()))
    return report

"""Each test begins with a service that is as shipped and holds nothing."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.systemd.booted import service

_FAILED: list[str] = []  # node ids, since the last reset


@pytest.fixture(autouse=True)
def empty_service() -> None:
    """Take away what the test before has left; after a failure all of it, the daemon too."""
    if _FAILED:
        service.reset()
        _FAILED.clear()
    else:
        service.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add what the service had to say to the report of a failure."""
    report = yield
    if report.failed:
        _FAILED.append(report.nodeid)
        report.sections.append(("journal of gmemd.service", service.journal()))
    return report

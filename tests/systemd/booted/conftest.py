"""gmemd is what docs/systemd.md installs; each test begins with a service that is as shipped and holds nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator

import pytest

from tests.systemd import boot
from tests.systemd.booted import service

_FAILED: list[str] = []  # node ids, since the last reset


@pytest.fixture(autouse=True, scope="session", params=[boot.INSIDE] if boot.INSIDE else boot.RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """Whose systemd it is."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True, scope="session")
def installed(release: str) -> None:
    """Type what the page says, once."""
    if not service.PROGRAM.exists():
        service.type_block(0)
        if os.path.exists("/dev/kvm"):
            shutil.chown("/dev/kvm", group="kvm")  # udev, where there is one


@pytest.fixture(autouse=True)
def empty_service(request: pytest.FixtureRequest) -> None:
    """Take away what the test before has left; after a failure all of it, the daemon too."""
    if service.rebooted(request.node.nodeid):
        return
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

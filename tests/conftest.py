"""Fixtures for all tests: a running gmemd, and which tests this host cannot run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon import Daemon
from tests.lingering import Lingering

pytest_plugins = ["pytester", "tests.scheduling"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `kvm` where the real kernel has no shared guest_memfd for us, and say why."""
    marked = [item for item in items if item.get_closest_marker("kvm")]
    if not marked:
        return
    from gmemd.kernel.choose import choose_kernel

    kernel = choose_kernel("auto")
    if kernel.name != "kvm":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs KVM's guest_memfd: {kernel.why}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have measured: record_property("figure", "...")."""
    figures = [value for reports in terminalreporter.stats.values() for report in reports
               if isinstance(report, pytest.TestReport) and report.when == "teardown"
               for name, value in report.user_properties if name == "figure"]
    if figures:
        terminalreporter.section("figures")
        for figure in figures:
            terminalreporter.line(str(figure))


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    """A gmemd just started, without any objects."""
    with Daemon() as daemon:
        yield daemon


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    """A socket whose last close takes until the end of the test."""
    made = Lingering()
    yield made
    made.let_go()

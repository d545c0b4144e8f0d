"""The tests of `booted/` run inside a real systemd, and are answered here by what they did in there.

Outside: the first of them boots this machine's systemd in namespaces of its own, with gmemd of this tree
installed, and a second pytest runs all selected ones in there.
Inside: they are ordinary tests, as root, with systemctl and a journal.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.systemd import boot

BOOTED = Path(__file__).parent / "booted"
_REPORTS = pytest.StashKey[boot.Reports]()


def pytest_configure(config: pytest.Config) -> None:
    """Inside: write the reports down, for the run outside."""
    if boot.INSIDE:
        config.pluginmanager.register(_Writer(config), "gmemd-reports")


class _Writer:
    """Writes each report as a line."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with boot.REPORTS.open("a") as file:
            print(json.dumps(data), file=file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Outside: skip them where systemd cannot be booted."""
    booted = [item for item in items if item.path.parent == BOOTED]
    if boot.INSIDE or not booted:
        return
    missing = boot.missing()
    for item in booted:
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"a boot of systemd needs {missing}"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Outside: instead of running one of them, give the reports of the run inside."""
    if boot.INSIDE or item.path.parent != BOOTED or item.get_closest_marker("skip"):
        return None
    reports = item.session.stash.get(_REPORTS, None)
    if reports is None:
        booted = [other.nodeid for other in item.session.items if other.path.parent == BOOTED]
        reports = item.session.stash[_REPORTS] = boot.run(booted, item.config.getoption("maxfail") or 0)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports.by_test.get(item.nodeid) or [_lost(item, reports)]:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        if isinstance(report.longrepr, list):  # of a skipped test: a tuple that JSON made a list
            report.longrepr = tuple(report.longrepr)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _lost(item: pytest.Item, reports: boot.Reports) -> dict[str, object]:
    """Make the report of a test that did not come to its end in there; the first one says all there is to say."""
    why = f"no report from inside:\n{reports.log}"
    reports.log = "(see above)"
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    assert isinstance(data, dict)
    return data

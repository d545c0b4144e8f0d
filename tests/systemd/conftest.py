"""The tests of `booted/` run inside a real systemd, and are answered here by what they did in there.

Outside: each is there once for each systemd. The first of them boots all of these, each in namespaces of its own,
and in each a second pytest runs those selected for it.
Inside: they are ordinary tests, as root, with systemctl and a journal.
A test may end all of it by a soft-reboot; pytest is then started once more, and goes on with that test.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.systemd import boot

BOOTED = Path(__file__).parent / "booted"
_RUNS = pytest.StashKey[dict[str, "Future[boot.Reports]"]]()  # by release


def pytest_configure(config: pytest.Config) -> None:
    """Inside: write the reports down, for the run outside."""
    if boot.INSIDE:
        config.pluginmanager.register(_Writer(config), "gmemd-reports")
        for name in ("PYTHONPATH", "LD_LIBRARY_PATH"):  # what we are run with is not for those whom we run
            os.environ.pop(name, None)


class _Writer:
    """Writes each report as a line."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._lines.append(json.dumps(data) + "\n")
        if report.when == "teardown":  # all or none: a test that a soft-reboot has interrupted begins once more
            with boot.REPORTS.open("a") as file:
                file.writelines(self._lines)
            self._lines.clear()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Outside: skip them where systemd cannot be booted. Inside: after a soft-reboot, what has reported is done."""
    if boot.INSIDE:
        done = {json.loads(line)["nodeid"] for line in _written()}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]
        return
    booted = [item for item in items if _is_booted(item)]
    missing = booted and boot.missing()
    for item in booted:
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"a boot of systemd needs {missing}"))


def _written() -> list[str]:
    return boot.REPORTS.read_text().splitlines() if boot.REPORTS.exists() else []


def _is_booted(item: pytest.Item) -> bool:
    return item.path.parent == BOOTED


def _release(item: pytest.Item) -> str:
    name: str = item.callspec.params["release"]  # type: ignore[attr-defined]
    return name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Outside: instead of running one of them, give the reports of the run inside."""
    if boot.INSIDE or not _is_booted(item) or item.get_closest_marker("skip"):
        return None
    try:
        reports = _run_of(item).result()
    except boot.MissingError as exc:
        item.add_marker(pytest.mark.skip(reason=f"a boot of systemd needs {exc}"))
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in reports.by_test.get(item.nodeid) or [_lost(item, reports)]:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        if isinstance(report.longrepr, list):  # of a skipped test: a tuple that JSON made a list
            report.longrepr = tuple(report.longrepr)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_of(item: pytest.Item) -> Future[boot.Reports]:
    """The run of the item's release; all begin with the first that is asked for."""
    stash = item.session.stash
    if _RUNS not in stash:
        tests: dict[str, list[str]] = {}
        for other in item.session.items:
            if _is_booted(other):
                tests.setdefault(_release(other), []).append(other.nodeid)
        maxfail = item.config.getoption("maxfail") or 0
        with boot.huge_pages(), ThreadPoolExecutor() as pool:
            stash[_RUNS] = {release: pool.submit(boot.run, release, ids, maxfail) for release, ids in tests.items()}
    return stash[_RUNS][_release(item)]


def _lost(item: pytest.Item, reports: boot.Reports) -> dict[str, object]:
    """Report a test that did not finish in there; the first one shows everything that is known."""
    why = f"no report from inside:\n{reports.log}"
    reports.log = "(see above)"
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call")
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
    assert isinstance(data, dict)
    return data

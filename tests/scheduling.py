"""Which tests may run beside each other, when pytest-xdist runs them in several processes (script/test).

A file's tests stay together, and so do all that change what the whole machine has: its pools of huge pages, a booted
systemd, containers. What takes longest begins first, so that no process is left with it at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

MACHINE = ("tests/systemd/", "tests/containers/", "tests/kernel/", "tests/e2e/test_libvirt.py",
           "tests/snapshots/test_kinds.py", "tests/commands/test_hugetlb.py", "tests/commands/test_accounting.py")
LONG = ("tests/containers/", "tests/kernel/", "tests/systemd/", "tests/e2e/", "tests/robustness/", "tests/emulator/",
        "tests/snapshots/", "tests/persist/", "tests/keeper/")  # the longest first; systemd's wait for script/tree


def scope(nodeid: str) -> str:
    """Tests of the same scope run in the same process, one after the other."""
    path = nodeid.partition("::")[0]
    return "machine" if path.startswith(MACHINE) else path


def _turn(item: pytest.Item) -> int:
    own = scope(item.nodeid) == "machine"
    found = next((place for place, long in enumerate(LONG) if item.nodeid.startswith(long)), len(LONG))
    return found - len(LONG) if own else found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them into the order in which they are shared out."""
    items.sort(key=_turn)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """What shares out the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False  # or the files with most tests would come first
    return Scheduling(config, log)

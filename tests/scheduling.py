"""Which tests may run beside each other, when pytest-xdist runs them in several processes (script/test).

A file's tests stay together, and so do all that change what the whole machine has: its pools of huge pages, a booted
systemd, containers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

MACHINE = ("tests/systemd/", "tests/containers/", "tests/kernel/", "tests/e2e/test_libvirt.py",
           "tests/snapshots/test_kinds.py", "tests/commands/test_hugetlb.py", "tests/commands/test_accounting.py")


def scope(nodeid: str) -> str:
    """Tests of the same scope run in the same process, one after the other."""
    path = nodeid.partition("::")[0]
    return "machine" if path.startswith(MACHINE) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """What shares out the tests."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scheduling(config, log)

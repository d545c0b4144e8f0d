"""The fixture that other people's tests use."""

from __future__ import annotations

import os
import sys

import pytest

import gmemd.testing
from gmemd.client.running import RunningGmemd
from tests.programs import output

EXAMPLE = '''
    import mmap
    import os

    import pytest

    pytest_plugins = ["gmemd.testing"]
    ADD = {"qom-type": "memory-backend-memfd", "id": "ram", "size": 4096}

    def test_plain(gmemd):
        with gmemd.client() as qmp:
            qmp.execute("object-add", ADD)
            assert qmp.execute("query-memdev-status")[0]["kernel"] == "simulated"

    @pytest.mark.gmemd(kernel="simulated:6.12")
    def test_profile(gmemd):
        with gmemd.client() as qmp, pytest.raises(Exception, match="does not support guest-memfd flag: 0x3"):
            qmp.execute("object-add", {**ADD, "guest-memfd": "on"})

    @pytest.mark.gmemd(keep=True)
    def test_crash(gmemd):
        with gmemd.client() as qmp:
            qmp.execute("object-add", ADD)
            _, [fd] = qmp.execute_fds("memdev-get-fd", {"id": "ram"})
        with mmap.mmap(fd, 4096) as memory:
            memory[:5] = b"hello"
        os.close(fd)
        gmemd.crash()
        with gmemd.client() as qmp:
            _, [fd] = qmp.execute_fds("memdev-get-fd", {"id": "ram"})
        with mmap.mmap(fd, 4096) as memory:
            assert memory[:5] == b"hello"
        os.close(fd)
'''


@pytest.mark.e2e
def test_the_documented_example(pytester: pytest.Pytester) -> None:
    """A foreign test suite gets a daemon, a chosen kernel profile, and a crash that loses nothing."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(EXAMPLE)
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=3)


def test_a_start_of_pytest_loads_little() -> None:
    """pytest loads the plugin wherever gmemd is installed: for a suite that does not use it nothing else is loaded."""
    code = "import sys, pytest; before = set(sys.modules); import gmemd.testing; print(*set(sys.modules) - before)"
    said = output([sys.executable, "-c", code], env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""})
    assert set(said.split()) == {"gmemd", "gmemd.testing"}


def test_without_the_fixture() -> None:
    """The class that the fixture gives can be had where the fixture is."""
    assert gmemd.testing.RunningGmemd is RunningGmemd
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        gmemd.testing.Nothing  # noqa: B018

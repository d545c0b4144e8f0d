"""What docs/systemd.md says to type does what the page says, on a host that has had no gmemd before."""

from __future__ import annotations

import pytest

from tests.systemd.booted.service import output, systemctl, type_block

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_both_programs_are_found() -> None:
    """What is in the PATH is what was installed, in a place that the service can see."""
    for program in ("gmemd", "gmemctl"):
        assert output("readlink", "-f", f"/usr/local/bin/{program}") == f"/opt/gmemd/bin/{program}"
        assert output(program, "--help")


def test_gmemctl_works() -> None:
    """gmemctl finds the service by itself, which starts with this first client; then the page's look at it works."""
    systemctl("stop", "gmemd.service")
    output("gmemctl", "create", "memory-backend-memfd,id=ram0,size=1M")
    assert "ram0" in output("gmemctl", "ls")
    said = type_block(1)
    assert "Status:" in said
    assert "\n1\n" in said  # NFileDescriptorStore

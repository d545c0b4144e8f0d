"""The Linux guest of the tests is what they take it for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gmemd.client.client import Client
from tests.guests.linux import LinuxGuest, needs_qemu
from tests.patience import PATIENCE

pytestmark = [pytest.mark.e2e, needs_qemu]


def test_it_counts_and_stops(tmp_path: Path) -> None:
    """It counts while it runs, says nothing while it is stopped, and goes on with the next number."""
    guest = LinuxGuest(tmp_path)
    with subprocess.Popen(guest.command("first", backend="memory-backend-memfd,id=ram,size=128M")) as qemu:
        try:
            guest.wait_started()
            with Client(guest.qmp("first"), timeout=PATIENCE) as monitor:
                monitor.execute("stop")
                assert guest.is_quiet()
                mark = guest.mark()
                monitor.execute("cont")
            guest.check_went_on(mark, sums=1)
            assert guest.run("first", "echo $((6 * 7))") == "42"
        finally:
            qemu.kill()

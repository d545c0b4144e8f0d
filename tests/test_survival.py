"""What an object outlives, for each manager and each kind of memory."""

from __future__ import annotations

import os

import pytest

from gmemd.persist.manager import Manager
from gmemd.survival import Keeping, fates

ALWAYS = ["vmm-crash", "client-disconnect"]
CRASH = [*ALWAYS, "gmemd-crash", "gmemd-upgrade"]
STOP = [*CRASH, "service-stop", "soft-reboot"]


@pytest.mark.parametrize(("keeping", "kind", "kept", "survived"), [
    (Keeping(), "memfd", False, ALWAYS),
    (Keeping("keeper"), "memfd", True, CRASH),
    (Keeping("keeper"), "memfd", False, ALWAYS),
    (Keeping("keeper", pid=os.getppid()), "memfd", True, CRASH),
    (Keeping("keeper", pid=os.getpid()), "memfd", True, ALWAYS),
    (Keeping("systemd"), "guest-memfd", True, CRASH),
    (Keeping("systemd", preserve=True), "guest-memfd", True, STOP),
    (Keeping("systemd", preserve=True, live_update=True), "memfd", True, [*STOP, "kexec"]),
    (Keeping("systemd", preserve=True, live_update=True), "guest-memfd", True, STOP),
    (Keeping("systemd", preserve=True, live_update=True), "hugetlb-memfd", True, STOP),
])
def test_fates(keeping: Keeping, kind: str, kept: bool, survived: list[str]) -> None:
    """Each event is answered, and where the answer is no there is advice."""
    found = fates(kind, kept=kept, opted_out=not kept, keeping=keeping)
    assert [fate.event for fate in found if fate.survives] == survived
    assert len(found) == 8
    assert all(bool(fate.advice) is not fate.survives for fate in found)


@pytest.mark.parametrize(("environ", "keeping"), [
    ({}, Keeping()),
    ({"NOTIFY_SOCKET": "/tmp/x.notify", "FDSTORE": "9"}, Keeping("keeper", pid=os.getppid())),
    ({"NOTIFY_SOCKET": "/run/systemd/notify", "GMEMD_FDSTORE_PRESERVE": "yes"}, Keeping("systemd")),
])
def test_the_manager_is_known_by_its_environment(environ: dict[str, str], keeping: Keeping) -> None:
    """systemd by its notify socket, preservation only with a systemd that knows it."""
    from gmemd.persist.manager import _keeping

    assert _keeping(dict(environ)) == keeping
    assert Manager.from_environ({}).keeping == Keeping()

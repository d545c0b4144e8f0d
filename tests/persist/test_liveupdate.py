"""Whether this host carries memory across a kexec, by what it shows."""

from __future__ import annotations

import gzip
import os
import platform
from pathlib import Path

import pytest

from gmemd.persist.liveupdate import holes, is_on, judge

BUILT = "CONFIG_LIVEUPDATE=y\nCONFIG_LIVEUPDATE_MEMFD=y\n"
NOT_BUILT = "CONFIG_LIVEUPDATE=y\n# CONFIG_LIVEUPDATE_MEMFD is not set\n"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host with live update, whose device is hidden; the kernel's configuration is not shown."""
    (tmp_path / "sys/class/misc/liveupdate").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "boot").mkdir()
    return tmp_path


def shows(host: Path, config: str) -> None:
    (host / "proc/config.gz").write_bytes(gzip.compress(config.encode()))


def switch_off(host: Path) -> None:
    (host / "sys/class/misc/liveupdate").rmdir()


def test_it_is_there(host: Path) -> None:
    shows(host, BUILT)
    assert is_on(str(host))
    assert judge(261, str(host)) == ("yes", "")


def test_the_configuration_next_to_the_kernel(host: Path) -> None:
    (host / f"boot/config-{platform.release()}").write_text(BUILT)
    assert judge(262, str(host)) == ("yes", "")


@pytest.mark.parametrize(("config", "on", "version", "advice"), [
    (BUILT, True, 260, "live update needs systemd 261 (this is 260)"),
    (BUILT, False, 261, "live update needs kho=on liveupdate=on on the kernel's command line"),
    (NOT_BUILT, True, 261, "live update needs a kernel with CONFIG_LIVEUPDATE_MEMFD"),
    ("", False, 252, "live update needs a kernel with CONFIG_LIVEUPDATE_MEMFD, kho=on liveupdate=on on its command "
                     "line, systemd 261 (this is 252)"),
])
def test_the_advice_names_all_that_is_needed(host: Path, config: str, on: bool, version: int, advice: str) -> None:
    shows(host, config)
    if not on:
        switch_off(host)
    assert judge(version, str(host)) == ("no", advice)


def test_what_is_not_shown_is_not_known(host: Path) -> None:
    """A hidden configuration, a damaged one, a manager that does not say its version."""
    assert judge(261, str(host))[0] == "unknown"
    (host / "proc/config.gz").write_bytes(gzip.compress(BUILT.encode())[:-9])
    assert judge(261, str(host))[0] == "unknown"
    shows(host, BUILT)
    assert judge(0, str(host)) == ("unknown", "systemd does not say its version: 261 is needed")


def test_holes_are_counted_once_for_each_file() -> None:
    fd = os.memfd_create("holes")
    again = os.dup(fd)
    try:
        os.truncate(fd, 10 << 20)
        os.pwrite(fd, bytes(4096), 0)
        assert holes([fd, again]) == (10 << 20) - 4096
        assert holes([f"/proc/self/fd/{fd}"]) == (10 << 20) - 4096
    finally:
        os.close(fd)
        os.close(again)

"""What README and the how-to pages tell people to type works, and what they link to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.programs import ROOT

pytestmark = pytest.mark.e2e

# Blocks of these pages run, one after another, on a gmemd without objects (gmemctl.md: tests/cli).
PAGES = ("README.md", "docs/qemu.md", "docs/audit.md")
# What the other blocks need, and which tests run the same: a marked block must be on one of these pages.
MARKED = {
    "clone": {"README.md"},  # tests/e2e/test_fresh_clone.py
    "podman": {"README.md", "docs/containers.md"},  # tests/containers
    "host": {"docs/systemd.md"},  # tests/systemd installs the units its own way
    "qemu": {"docs/qemu.md"},  # tests/e2e/test_qemu_boots.py
}
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```sh ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Word behind "sh" and text of each block."""
    return [(found[1].strip(), found[2]) for found in _BLOCK.finditer(page.read_text())]


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name: str, tmp_path: Path) -> None:
    """Every line of the page's unmarked blocks succeeds."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("gmemctl", "gmemd"):
        file = programs / program
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -m gmemd.cli.{program} "$@"\n')
        file.chmod(0o755)
    text = "".join(text for word, text in blocks(ROOT / name) if not word).replace("/tmp/", f"{tmp_path}/")
    script = f"set -eu\ntrap 'kill $(jobs -p) 2>/dev/null && wait' EXIT\n{text}"
    with Daemon(kernel="simulated") as daemon:
        environment = {**os.environ, "GMEMD_SOCKET": str(daemon.sock), "PYTHONPATH": str(ROOT),
                       "PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True,
                              timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hint" not in done.stderr
    assert "Traceback" not in done.stderr


def test_blocks_that_do_not_run_say_what_they_need() -> None:
    """A block is left out only by a word that is listed here, on a page that is listed with it."""
    found: dict[str, set[str]] = {}
    for page in ALL:
        for word, _ in blocks(page):
            if word:
                found.setdefault(word, set()).add(str(page.relative_to(ROOT)))
    assert found == MARKED


def test_every_page_with_blocks_is_run() -> None:
    unmarked = {str(page.relative_to(ROOT)) for page in ALL if any(not word for word, _ in blocks(page))}
    assert unmarked == {*PAGES, "docs/gmemctl.md"}


def test_the_fixture_page_runs(tmp_path: Path) -> None:
    """The tests on docs/testing.md pass as they stand there."""
    [text] = re.findall(r"^```python test_vmm.py\n(.*?)^```", (ROOT / "docs" / "testing.md").read_text(),
                        re.DOTALL | re.MULTILINE)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gmemd.testing"]\n')
    (tmp_path / "test_vmm.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
                           str(tmp_path)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_links_lead_somewhere() -> None:
    """Every relative link of README and docs names a file that is there."""
    lost = [(page.name, link) for page in ALL for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
            if not (page.parent / link).exists()]
    assert lost == []

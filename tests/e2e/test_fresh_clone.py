"""What a newcomer does first works in a fresh clone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.programs import ROOT, needs, output

SET_UP = 300.0  # seconds; installs the package's requirements

pytestmark = [pytest.mark.e2e, pytest.mark.slow, needs("git"),
              pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")]


def test_script_run(tmp_path: Path) -> None:
    """script/run sets itself up, shows memory outliving a guest, and leaves a daemon that answers."""
    clone = tmp_path / "gmemd"
    output(["git", "clone", "--quiet", str(ROOT), str(clone)])
    environment = {name: value for name, value in os.environ.items()
                   if not name.startswith(("COVERAGE", "PYTHON", "VIRTUAL_ENV"))}
    run = subprocess.run([clone / "script" / "run"], cwd=tmp_path, env=environment, timeout=SET_UP,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "guest loaded into the memory, counter 0" in run.stdout
    assert re.search(r"guest found in the memory, counter \d+", run.stdout)
    pid = int(re.findall(r"To end it: kill (\d+)", run.stdout)[0])
    try:
        sock = re.findall(r"export GMEMD_SOCKET=(\S+)", run.stdout)[0]
        listed = output([str(clone / ".venv" / "bin" / "gmemctl"), "--socket", sock, "-o", "json", "ls"])
        assert [memdev["id"] for memdev in json.loads(listed)] == ["gm0"]
    finally:
        os.kill(pid, signal.SIGTERM)

"""docs/gmemctl.md says what is so: its shell blocks run, and so do the examples of the help."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.cli.gmemctl import VERBS
from tests.cli.conftest import Gmemctl
from tests.daemon import Daemon
from tests.patience import PATIENCE
from tests.programs import ROOT
from tests.programs import gmemctl as gmemctl_words

# their examples need a VMM; tests/vmm, tests/guests, docs/qemu.md
OF_VMMS = ("run", "adopt", "attach", "detach", "replace", "checkpoint", "rollback", "fork", "snapshot import")
OF_TWO = ("export", "import", "move")  # from one gmemd to another: tests/e2e/test_moving.py
OF_CLUSTERS = ("nodes",)  # tests/kubernetes/test_nodes.py

PAGE = (ROOT / "docs" / "gmemctl.md").read_text()


@pytest.mark.slow
def test_blocks_run(tmp_path: Path) -> None:
    """Every line of the page's shell blocks succeeds, in the order of the page."""
    program = tmp_path / "gmemctl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m gmemd.cli.gmemctl "$@"\n')
    program.chmod(0o755)
    script = "set -e\n" + "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
    with Daemon(kernel="simulated") as daemon:
        environment = {
            **os.environ,
            "GMEMD_SOCKET": str(daemon.sock),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE,
            check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hello" in done.stdout
    assert "hint" not in done.stderr


@pytest.mark.usefixtures("client")
def test_python_block_runs(shared: Daemon, capfd: pytest.CaptureFixture[str]) -> None:
    """The page's Python program makes an object and gets its descriptor."""
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found: dict[str, int] = {}
    exec(program.replace("/run/gmemd/qmp.sock", str(shared.sock)), found)
    assert capfd.readouterr().out == f"{64 << 20} 0 {os.fstat(found['fd']).st_ino}\n"
    os.close(found["fd"])


def test_dialogues_are_as_shown(gmemctl: Gmemctl) -> None:
    """What the page shows behind a prompt, gmemctl says."""
    dialogues = re.findall(r"^```text\n\$ gmemctl (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
    assert len(dialogues) == 1
    for words, said in dialogues:
        outcome = gmemctl(*shlex.split(words))
        assert outcome.out + outcome.err == said


@pytest.mark.parametrize("verb", [verb for verb in VERBS
                                  if verb not in ("doctor", "shell", *OF_VMMS, *OF_TWO, *OF_CLUSTERS)])
def test_examples_work(verb: str, gmemctl: Gmemctl, shared: Daemon, tmp_path: Path) -> None:
    """What the help shows can be typed as it stands, where there are objects of these names."""
    for spec in ("ram0", "ram1", "vm00", "gm0,guest-memfd=on", "gm1,guest-memfd=on"):
        gmemctl("create", f"memory-backend-memfd,size=2M,id={spec}")
    if verb.startswith("snapshot"):
        gmemctl("snapshot", "save", "ram0", "clean")
    if verb == "room rm":
        gmemctl("room", "add", "room1")
    if verb == "clone":
        gmemctl("create", "memory-backend-memfd,size=2M,id=template")
        gmemctl("freeze", "template")
    if verb == "apply":
        [text] = re.findall(r"^cat > guests.yaml <<END\n(.*?)^END", PAGE, re.DOTALL | re.MULTILINE)
        (tmp_path / "guests.yaml").write_text(text)
    assert VERBS[verb].examples
    for example in VERBS[verb].examples:
        if "create memory-backend-memfd,id=ram0" in example:
            gmemctl("rm", "ram0")
        if example == "top":
            continue
        line = shlex.join(gmemctl_words("--socket", str(shared.sock))) + f" {example}"
        done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert (done.returncode, done.stderr.count("hint")) == (0, 0), done.stderr

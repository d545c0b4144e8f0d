"""Other programs that tests run: what is needed, and how gmemctl and gmemd are called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]


def needs(program: str) -> pytest.MarkDecorator:
    """Skip a test where `program` is missing."""
    missing = not shutil.which(program)
    return pytest.mark.skipif(missing, reason=f"needs {program} (script/packages installs it)")


def gmemctl(*arguments: str) -> list[str]:
    """Give the command line of a gmemctl."""
    return [sys.executable, "-m", "gmemd.cli.gmemctl", *arguments]


def output(argv: list[str], *, text: str = "", status: int = 0, env: dict[str, str] | None = None) -> str:
    """Run a command to its end, `text` on its standard input; give its standard output."""
    done = subprocess.run(argv, input=text, env=env, timeout=PATIENCE, capture_output=True, text=True,
                          check=False)
    assert done.returncode == status, f"{argv}: status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout

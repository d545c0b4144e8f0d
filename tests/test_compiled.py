"""The two builds of gmemd: pure Python, and compiled (setup.py), where script/compiled runs all these tests too."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import setuptools

from gmemd.cli.gmemd import built

ROOT = Path(__file__).parents[1]
COMPILED = os.environ.get("GMEMD_COMPILE") == "1"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, with "told": what it tells setuptools in a build that is not compiled."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.setenv("GMEMD_COMPILE", "")
    return {**runpy.run_path(str(ROOT / "setup.py")), "told": told}


def test_the_build_is_what_was_asked_for(setup: dict[str, Any]) -> None:
    """Every module of setup.py is compiled, or none; --version says so."""
    names = [path.removesuffix(".py").replace("/", ".") for path in setup["COMPILED"]]
    files = [Path(str(import_module(name).__file__)) for name in names]
    assert [file for file in files if (file.suffix == ".so") is not COMPILED] == []
    assert built() == ("compiled" if COMPILED else "pure Python")


def test_a_daemon_is_of_the_same_build() -> None:
    """Also one that is started by its module's name, as these tests start daemons."""
    done = subprocess.run([sys.executable, "-m", "gmemd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f"({built()})\n")


def test_nobody_asks_for_a_coroutine_by_its_type() -> None:
    """That of a compiled function is not a types.CoroutineType, and would pass for a finished command's result."""
    assert [path.name for path in (ROOT / "gmemd").rglob("*.py") if "CoroutineType" in path.read_text()] == []


def test_no_coroutine_is_compiled(setup: dict[str, Any]) -> None:
    """With some that were, a request got another's error, or the process ended."""
    trees = [ast.parse((ROOT / path).read_text()) for path in setup["COMPILED"]]
    assert [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)] == []


def test_a_source_install_is_pure(setup: dict[str, Any]) -> None:
    """Without the variable nothing is compiled, and mypy is not needed; a value that is neither is refused."""
    assert setup["told"] == {}
    assert setup["wanted"]("1")
    assert not setup["wanted"]("0")
    with pytest.raises(SystemExit, match="not 'yes'"):
        setup["wanted"]("yes")

"""What `pip install .` installs."""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.programs import ROOT, output

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_wheel(tmp_path: Path) -> None:
    """The wheel holds the code with its type marker and schema, both commands, and no tests."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gmemd", source / "gmemd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    output([sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation",
            "--wheel-dir", str(tmp_path), str(source)])
    [wheel] = tmp_path.glob("gmemd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [commands] = [name for name in names if name.endswith("entry_points.txt")]
        assert "gmemd = gmemd.cli.gmemd:main" in archive.read(commands).decode()
        assert "gmemctl = gmemd.cli.gmemctl:main" in archive.read(commands).decode()
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == {str(path.relative_to(source)) for path in (source / "gmemd").rglob("*") if path.is_file()}

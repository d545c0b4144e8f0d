"""What `pip install .` installs."""

from __future__ import annotations

import os
import re
import shutil
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.programs import ROOT, output

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
COMPILE = os.environ.get("GMEMD_COMPILE") == "1"  # as in script/compiled
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


# What another project has not: gmemd itself, as it stands in this tree, and what only its own tests need.
OUR_OWN = ("gmemd", "__editable__", "__pycache__", "a1_coverage", "coverage", "hypothesis", "_hypothesis",
           "pytest_asyncio", "schemathesis")
COMPILED = re.findall(r'^    "(gmemd/.*\.py)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)
FOREIGN = """
def test_it(gmemd):
    with gmemd.client() as qmp:
        assert qmp.execute("query-memdev") == []

def test_in_this_process():  # where pytest reads gmemd's modules in its own way
    from gmemd.kernel.program import worker_program
    assert worker_program().text
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a package is made of, and the package, `*.whl`, among them."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "gmemd", source / "gmemd", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source)
    output([*PIP, "wheel", "-qq", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source)])
    return source


def test_wheel(source: Path) -> None:
    """The wheel holds the code with its type marker and schema, both commands, and no tests.

    It is pure, or for this Python, with an extension module beside each compiled one and what these share.
    """
    [wheel] = source.glob("gmemd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [commands] = [name for name in names if name.endswith("entry_points.txt")]
        assert "gmemd = gmemd.cli.gmemd:main" in archive.read(commands).decode()
        assert "gmemctl = gmemd.cli.gmemctl:main" in archive.read(commands).decode()
    installed = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in installed if name.endswith(".so")}
    assert installed - extensions == {
        str(path.relative_to(source)) for path in (source / "gmemd").rglob("*") if path.is_file()}
    assert {name.partition(".")[0] for name in extensions} == (
        {"gmemd__mypyc", *(path.removesuffix(".py") for path in COMPILED)} if COMPILE else set())
    assert wheel.name.endswith("-none-any.whl") is not COMPILE


@pytest.fixture(scope="module")
def python(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of another project, which has installed gmemd and pytest."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory)
    [packages] = directory.glob("lib/python*/site-packages")
    for entry in Path(pytest.__file__).parents[1].iterdir():
        if not entry.name.startswith(OUR_OWN):
            (packages / entry.name).symlink_to(entry)
    output([*PIP, "install", "-qq", "--no-deps", "--no-warn-script-location", "--target", str(packages),
            *map(str, source.glob("gmemd-*.whl"))])
    return str(directory / "bin" / "python")


@pytest.mark.parametrize("conftest", ["", 'pytest_plugins = ["gmemd.testing"]'])
def test_pytest_finds_the_fixture(python: str, conftest: str, tmp_path: Path) -> None:
    """Nobody has to name the plugin; who names it all the same has it once."""
    (tmp_path / "test_it.py").write_text(FOREIGN)
    (tmp_path / "conftest.py").write_text(conftest)
    said = output([python, "-W", "error", "-m", "pytest", "-W", "error", "--strict-markers", "-p", "no:cacheprovider",
                   "--rootdir", str(tmp_path), str(tmp_path)], env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""})
    assert "2 passed" in said
    assert "warning" not in said

"""What runs gmemd: the Python, and the trees of this repository, of a commit, or of whatever command."""

from __future__ import annotations

import compileall
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_OWN = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"  # the distribution's, of the same ABI
_WORK = """
import timeit
def work():
    found = {}
    for i in range(2000):
        found[str(i)] = [i, i + 1]
    return sum(len(key) + value[0] for key, value in found.items())
print(min(timeit.repeat(work, number=10, repeat=20)))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python with gmemd's libraries, but without gmemd: that comes by PYTHONPATH."""

    path: str
    words: str  # for the report


def distribution_python(directory: str) -> Interpreter | None:
    """The distribution's Python in a virtual environment made in `directory`, with the libraries of this process.

    None where there is none of this version, or the libraries do not work with it.
    """
    python = f"{directory}/python/bin/python"
    try:
        subprocess.run([_OWN, "-m", "venv", "--without-pip", f"{directory}/python"], check=True, capture_output=True)
        packages = next(Path(f"{directory}/python/lib").glob("python3*/site-packages"))
        (packages / "libraries.pth").write_text(sysconfig.get_path("platlib") + "\n")
        subprocess.run([python, "-c", "import gmemd.daemon, gmemd.cli.gmemd, jsonschema, xxhash, aiohttp"], check=True,
                       capture_output=True)
    except (OSError, StopIteration, subprocess.CalledProcessError):
        return None
    return Interpreter(python, f"{_version(python)}, {_OWN}")


def running_python() -> Interpreter:
    """The Python of this process."""
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return Interpreter(sys.executable, f"{_version(sys.executable)}, {os.path.realpath(sys.executable)}, configured "
                       f"{'with' if optimised else 'without'} --enable-optimizations")


def compared(one: Interpreter, other: Interpreter) -> str:
    """How much longer than `one` the `other` takes for the same work: which of the two is optimised."""
    taken = {python.path: min(float(subprocess.check_output([python.path, "-c", _WORK])) for _ in range(3))
             for python in (one, other)}
    return f"{other.words}: takes {taken[other.path] / taken[one.path]:.2f} times as long for the same work"


def _version(python: str) -> str:
    return subprocess.check_output([python, "-c", "import platform; print(platform.python_version())"],
                                   text=True).strip()


def with_bytecode(tree: Path) -> Path:
    """A tree whose gmemd has its bytecode, as an installed one has."""
    compileall.compile_dir(tree / "gmemd", quiet=2)
    return tree


def compiled(directory: str) -> Path:
    """A copy of this tree in `directory` whose hot path is compiled (setup.py); SystemExit if that fails."""
    tree = Path(directory) / "compiled"
    shutil.copytree(ROOT / "gmemd", tree / "gmemd", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, text=True,
                          capture_output=True, env={**os.environ, "GMEMD_COMPILE": "1"})
    if done.returncode:
        sys.exit(f"bench/run: {done.stderr.strip()}")
    return with_bytecode(tree)


def checked_out(commit: str, directory: str) -> Path:
    """The tree of a commit in `directory`; SystemExit if there is no such commit, or a library it needs is missing."""
    tree = Path(directory) / commit
    tree.mkdir(parents=True)
    done = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if done.returncode:
        sys.exit(f"bench/run: {done.stderr.decode().strip()}")
    subprocess.run(["tar", "-xC", str(tree)], input=done.stdout, check=True)
    missing = _missing(tree)
    if missing:
        sys.exit(f"bench/run: gmemd of {commit} needs: {sys.executable} -m pip install {' '.join(missing)}")
    return with_bytecode(tree)


def _missing(tree: Path) -> list[str]:
    """The libraries that a tree needs for every Python, and this one lacks."""
    needs = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["dependencies"]
    missing = []
    for name in [re.split(r"[^\w.-]", need)[0] for need in needs if ";" not in need]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing

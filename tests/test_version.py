"""The version stands in two places."""

import tomllib
from pathlib import Path

import gmemd


def test_the_versions_of_package_and_code_are_one() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert gmemd.__version__ == project["project"]["version"]

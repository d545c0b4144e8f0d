"""The blocks for podman in README and docs/containers.md work, and the files in examples/ci."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.containers.conftest import BUILD, ROOT, Image
from tests.containers.podman import Podman
from tests.e2e.test_docs import blocks

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

# Only how the image is built is this machine's: on which base, from which package index.
PODMAN = """#!/bin/sh
if [ "$1" = build ]; then
    shift
    case $* in *--secret*) set -- {build} "$@" ;; *) set -- {build} {secrets} "$@" ;; esac
    set -- build "$@"
fi
exec {podman} "$@"
"""


@pytest.fixture
def user(podman: Podman, image: Image) -> Iterator[Podman]:
    """podman as a user has it, with nothing of ours but the image's layers."""
    where = podman.command("sh", "-c", "command -v podman").stdout.strip()
    build, secrets = BUILD
    script = podman.write("podman", PODMAN.format(podman=where, build=" ".join(build), secrets=" ".join(secrets)))
    Path(podman.seen_from_here(script)).chmod(0o755)
    yield podman
    _remove(podman)
    podman("volume", "rm", "gmemd")
    podman("rmi", "localhost/gmemd:latest")


def _remove(podman: Podman) -> None:
    podman.command("podman", "rm", "--force", "--time", "0", "gmemd", status=None)


@pytest.mark.parametrize("page", ["README.md", "docs/containers.md"])
def test_blocks_run(user: Podman, page: str) -> None:
    """In the order of the page; one that starts the server again does so once the one before is gone."""
    texts = [text for word, text in blocks(ROOT / page) if word == "podman"]
    for text in texts:
        if "/dev/kvm" in text and not Path("/dev/kvm").exists():
            continue
        if "--name gmemd" in text:
            _remove(user)
        place = ROOT if "podman build" in text else user.directory
        user.command("sh", "-euc", f"PATH={user.directory}:$PATH; cd {place}; {text}")
    assert "gmemd" in user("ps", "--format={{.Names}}")


# Of somebody's project: makes an object, and fails.
TESTS = """
import os, sys
from gmemd.client.client import Client
with Client(os.environ["GMEMD_SOCKET"], wait=180, timeout=180) as client:
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram", "size": 4096})
    client.execute_fds("memdev-get-fd", {"id": "ram"})
sys.exit(7)
"""
CI = ROOT / "examples" / "ci"


def test_compose(podman: Podman, image: Image) -> None:
    """Tests in a container of another user reach gmemd, and it all ends with their status; GitLab does the same."""
    podman.write("pytest.py", TESTS)
    podman.write("Dockerfile", f"FROM {image.name}\nENTRYPOINT []\nCOPY pytest.py /tests/\nENV PYTHONPATH=/tests\n"
                               "USER 10002:10002\n")
    podman("build", "--quiet", *BUILD[0], "--tag=localhost/tests", podman.directory)
    compose = ["env", f"GMEMD_IMAGE={image.name}", "TESTS_IMAGE=localhost/tests", sys.executable, "-m",
               "podman_compose", "--file", str(CI / "compose.yaml")]
    try:
        podman.command(*compose, "up", "--exit-code-from", "tests", status=7)
    finally:
        podman.command(*compose, "down", "--volumes")
    job = yaml.safe_load((CI / "gitlab-ci.yml").read_text())["integration"]
    assert job["script"][-1] == "docker compose --file compose.yaml up --exit-code-from tests"
    assert {"GMEMD_IMAGE", "TESTS_IMAGE"} < job["variables"].keys()


def test_github(podman: Podman, image: Image) -> None:
    """The steps of the job: gmemd is started and awaited, the tests reach it, its log is there."""
    podman.write("docker", '#!/bin/sh\nexec podman "$@"\n')
    Path(podman.seen_from_here(podman.directory / "docker")).chmod(0o755)
    podman.write("pytest.py", TESTS)
    job = yaml.safe_load((CI / "github.yml").read_text())["jobs"]["tests"]
    start, test, show = (step["run"] for step in job["steps"] if "run" in step)
    environment = {"GMEMD_IMAGE": image.name, "RUNNER_TEMP": podman.directory, "GITHUB_ENV": podman.directory / "env",
                   "PATH": f"{podman.directory}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "PYTHONPATH": f"{podman.directory}:{ROOT}"}
    step = ["env", *(f"{name}={value}" for name, value in environment.items()), "bash", "-euc"]
    podman.command(*step, start)
    try:
        podman.command(*step, f"set -a; . $GITHUB_ENV; {test}", status=7)
        assert '"object-add"' in podman.command(*step, show).stderr
    finally:
        podman.command("podman", "rm", "--force", "--time", "0", "gmemd")

"""The blocks for podman in README and docs/containers.md work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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

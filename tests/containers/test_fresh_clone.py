"""The README's first command in a container that has Python and a clone, and nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers.conftest import ROOT, SITE, base_image
from tests.containers.podman import Podman
from tests.programs import needs, output

pytestmark = [pytest.mark.e2e, pytest.mark.slow, needs("git"),
              pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")]


def test_from_nothing_to_the_first_object(podman: Podman, tmp_path: Path,
                                          record_property: Callable[[str, object], None]) -> None:
    """script/run sets itself up, tells its story, and leaves a daemon that has an object."""
    clone = tmp_path / "gmemd"
    output(["git", "clone", "--quiet", str(ROOT), str(clone)])
    site = [f"--volume={path}:{path}:ro" for path in SITE]
    base = base_image(podman)
    began = time.monotonic()
    done = podman.command("podman", "run", "--rm", "--pull=never", "--network=host", f"--volume={clone}:/gmemd",
                          *site, base, "sh", "-euc",
                          "cd /gmemd; script/run; .venv/bin/gmemctl --socket /tmp/gmemd*/*.sock ls")
    record_property("figure", f"from a fresh clone in an empty container to the first object and the end of the story:"
                              f" {time.monotonic() - began:.0f} s")
    assert re.search(r"^gm0 +memfd +guest-memfd ", done.stdout, re.MULTILINE)

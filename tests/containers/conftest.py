"""The image of this tree, built once, and containers of it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containers import podman as podman_module
from tests.containers.podman import Podman, private_podman

ROOT = Path(__file__).parents[2]
_IMAGE = "localhost/gmemd:test"
_BASE = "localhost/gmemd-base:test"
SITE = tuple(path for path in map(Path, ("/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")) if path.exists())
_COMPILE = os.environ.get("GMEMD_COMPILE", "")  # script/compiled sets it; the base then has what that needs
# How to build here: on what, and with the site's settings, where there are any: how to reach the package index.
BUILD = (("--pull=never", "--isolation=chroot", "--network=host", f"--build-arg=BASE={_BASE}",
          f"--build-arg=GMEMD_COMPILE={_COMPILE}"),
         tuple(f"--secret=id={path.name},src={path}" for path in SITE))


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    """A podman of its own."""
    missing = podman_module.missing()
    if missing:
        pytest.skip(f"containers need {missing}")
    with private_podman() as podman:
        yield podman


def base_image(podman: Podman) -> str:
    """The name of the base, made of this machine's packages if it is not there yet."""
    if podman.command("podman", "image", "exists", _BASE, status=None).returncode != 0:
        more = ("gcc", "python3-dev") if _COMPILE else ()
        podman.command(ROOT / "tests" / "containers" / "base-image.sh", _BASE, *more)
    return _BASE


@dataclass(frozen=True)
class Image:
    """What was built, and how."""

    name: str
    size: int  # bytes
    base_seconds: float
    build_seconds: float


@pytest.fixture(scope="session")
def image(podman: Podman) -> Image:
    """The image built from the Dockerfile, on a base made of this machine's packages."""
    start = time.monotonic()
    base_image(podman)
    base = time.monotonic()
    flags, secrets = BUILD
    podman("build", "--quiet", "--format=docker", *flags, *secrets, f"--tag={_IMAGE}", ROOT)
    end = time.monotonic()
    size = int(podman("image", "inspect", "--format={{.Size}}", _IMAGE))
    return Image(_IMAGE, size, base - start, end - base)

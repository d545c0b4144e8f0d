"""Debian packages of all releases, by an apt of the lab's own: that of the machine stays as it is."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

CACHE = Path(os.environ.get("KERNEL_LAB_CACHE")
             or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gmemd-kernel-lab")

_SUITES = "bookworm bookworm-updates bookworm-backports trixie trixie-updates trixie-backports sid experimental"
_SOURCE = f"""Types: deb
URIs: %s
Suites: {_SUITES}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
# The dates are not asked for: a mirror that lags would stop it.
_CONFIGURATION = """Dir "%s";
Dir::Etc "etc";
Dir::State "state";
Dir::State::status "%s/status";
Dir::Cache "cache";
APT::Architecture "amd64";
APT::Sandbox::User "root";
Acquire::Check-Valid-Until "false";
Acquire::Check-Date "false";
Acquire::Languages "none";
"""


def mirror() -> str:
    """The mirror that this machine's apt uses for Debian."""
    found = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages",
                            "Origin: Debian"], capture_output=True, text=True, check=True).stdout.split()
    if not found:
        raise SystemExit("apt has no source of Debian")
    return found[0]


def apt(*words: str | Path, folder: Path | None = None) -> str:
    """What an apt command says about the packages of all releases; it runs in `folder`."""
    home = CACHE / "apt"
    configuration = home / "apt.conf"
    environment = {**os.environ, "APT_CONFIG": str(configuration)}
    if not configuration.exists():
        for name in ("etc/sources.list.d", "etc/preferences.d", "etc/apt.conf.d", "state/lists/partial",
                     "cache/archives/partial"):
            (home / name).mkdir(parents=True, exist_ok=True)
        (home / "status").touch()
        (home / "etc/sources.list.d/debian.sources").write_text(_SOURCE % mirror())
        new = home / "new.conf"
        new.write_text(_CONFIGURATION % (home, home))
        subprocess.run(["apt-get", "-qq", "update"], env={**environment, "APT_CONFIG": str(new)}, check=True)
        new.rename(configuration)
    return subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def releases() -> list[str]:
    """The releases of the kernels that Debian packages now, the newest first: 7.3.4+deb13-amd64."""
    listed = apt("apt-cache", "show", "linux-image-amd64")
    return list(dict.fromkeys(re.findall(r"linux-image-(\d\S+) \(=", listed)))


@contextmanager
def unpacked(*names: str) -> Iterator[Path]:
    """The contents of packages, in a folder that is gone afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=CACHE) as scratch:
        folder = Path(scratch)
        apt("apt-get", "-qq", "download", *names, folder=folder)
        for package in folder.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, folder / "tree"], check=True)
        yield folder / "tree"

"""The kernels of the lab: Debian's, that with live update, and those of who uses the lab."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.kernel.lab import root
from tests.kernel.lab.packages import CACHE, apt, releases, unpacked

LUO = "luo"
_SOURCE = "linux-source-7.3"
_HERE = Path(__file__).parent


class Kernel(NamedTuple):
    """What boots: a bzImage, and its modules (lib/modules/RELEASE) where not all that is needed is built in."""

    image: Path
    modules: Path | None


def here() -> dict[str, Path]:
    """The kernels in the cache, by name."""
    return {path.parent.name: path.parent for path in sorted(CACHE.glob("kernels/*/vmlinuz"))}


def named(name: str) -> Kernel:
    """The kernel of a name, or of the first part of its release, fetched or built if it is not here yet."""
    if name not in here():
        release = chosen(name, [*reversed(here()), *releases(), LUO])
        if release is None:
            raise SystemExit(f"Debian has no kernel '{name}': {', '.join(releases())}")
        if release not in here():
            _build() if release == LUO else _fetch(release)
        name = release
    folder = here()[name]
    return Kernel(folder / "vmlinuz", folder / "modules" if (folder / "modules").exists() else None)


def chosen(name: str, known: Iterable[str]) -> str | None:
    """The first of the releases that has this name, or begins with it."""
    return next((one for one in known if re.match(rf"{re.escape(name)}(?![0-9a-z])", one)), None)


def _fetch(release: str) -> None:
    # one package before 7.2, then several
    parts = [name for name in apt("apt-cache", "pkgnames", "linux-").split()
             if re.fullmatch(rf"linux-(image|binary|modules|base)-{re.escape(release)}", name)]
    with unpacked(*parts) as tree:
        new = tree / "new"
        new.mkdir()
        for name, pattern in (("vmlinuz", "vmlinuz*"), ("config", "config-*"), ("modules", f"modules/{release}")):
            shutil.move(next(tree.rglob(pattern)), new / name)
        _keep(new, release)


def _keep(new: Path, name: str) -> None:
    (CACHE / "kernels").mkdir(exist_ok=True)
    os.rename(new, CACHE / "kernels" / name)


def _build() -> None:
    """Build Linux with live update: no package has it. Takes a quarter of an hour of one CPU."""
    tree = root.tree()
    with unpacked(_SOURCE) as source:
        subprocess.run(["tar", "-xJf", source / f"usr/src/{_SOURCE}.tar.xz", "-C", source], check=True)
        folder = source / _SOURCE
        shutil.copy(_HERE / "luo.config", folder)
        shutil.copy(_HERE / "build", folder)
        at = tree / "usr/src/linux"
        at.mkdir(exist_ok=True)
        mounts = f"mount --bind {folder} {at} && mount -t proc proc {tree}/proc"
        subprocess.run(["unshare", "--mount", "sh", "-c", f"{mounts} && exec chroot {tree} /usr/src/linux/build"],
                       check=True)
        new = folder / "new"
        new.mkdir()
        shutil.move(folder / "arch/x86/boot/bzImage", new / "vmlinuz")
        shutil.move(folder / ".config", new / "config")
        _keep(new, LUO)

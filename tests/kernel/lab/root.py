"""The disk of the lab's machines: Debian sid with systemd, Python and what gmemd and its tests need."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

from tests.kernel.lab.packages import CACHE, mirror

TREE = Path(__file__).parents[3]  # of gmemd

_PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "kmod", "kexec-tools", "procps", "busybox-static", "python3",
             # to build a kernel
             "gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils")
_NOT_IN_IMAGE = ("./usr/src/*", "./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./var/cache/*",
                 "./var/lib/apt/*", "./proc/*", "./sys/*", "./tmp/*")
_PROGRAM = """#!/opt/venv/bin/python
from gmemd.cli.{0} import main
raise SystemExit(main())
"""


def tree() -> Path:
    """The folder with Debian's packages, made the first time."""
    made = CACHE / "root"
    if not made.exists():
        new = CACHE / "root.new"
        subprocess.run(["rm", "-rf", "--one-file-system", new], check=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        options = [f'--aptopt=Acquire::Check-{what} "false"' for what in ("Valid-Until", "Date")]
        subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "--include=" + ",".join(_PACKAGES), *options,
                        "sid", new, mirror()], check=True)
        new.rename(made)
    return made


def image() -> Path:
    """The disk, made anew when gmemd needs other packages; its tree of gmemd is put in place at each start."""
    made, stamp = CACHE / "root.img", CACHE / "root.for"
    needed = "\n".join(map(str, _requirements()))
    if not made.exists() or stamp.read_text() != needed:
        with TemporaryDirectory(dir=CACHE) as scratch:
            folder, new = Path(scratch) / "tree", Path(scratch) / "root.img"
            folder.mkdir()
            left = [f"--exclude={pattern}" for pattern in _NOT_IN_IMAGE]
            packed = subprocess.Popen(["tar", "-C", tree(), "-c", *left, "."], stdout=subprocess.PIPE)
            subprocess.run(["tar", "-C", folder, "-x"], stdin=packed.stdout, check=True)
            _install(folder)
            with new.open("wb") as file:
                file.truncate(6 << 30)
            subprocess.run(["mkfs.ext4", "-q", "-F", "-d", folder, new], check=True)
            new.rename(made)
        stamp.write_text(needed)
    return made


def busybox() -> Path:
    return tree() / "usr/bin/busybox"


def _requirements() -> list[Requirement]:
    """What gmemd and the tests that run in the lab need of PyPI."""
    project = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]
    tests = [word for word in project["optional-dependencies"]["test"] if re.match("pytest|hypothesis|pyyaml", word)]
    return [Requirement(word) for word in (*project["dependencies"], *tests)]


def _install(folder: Path) -> None:
    """Put an environment in /opt/venv of the tree that finds gmemd in /opt/gmemd."""
    subprocess.run(["chroot", folder, "python3", "-m", "venv", "--without-pip", "/opt/venv"], check=True)
    site = next(folder.glob("opt/venv/lib/python3*/site-packages"))
    version = site.parent.name.removeprefix("python")
    # pip would ask for the version of its own Python
    wanted = [f"{one.name}{one.specifier}" for one in _requirements()
              if not one.marker or one.marker.evaluate({"python_version": version})]
    subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--target", site,
                    "--python-version", version, "--only-binary=:all:", *wanted], check=True)
    (site / "gmemd.pth").write_text("/opt/gmemd\n")
    for name in ("gmemd", "gmemctl"):
        program = folder / "opt/venv/bin" / name
        program.write_text(_PROGRAM.format(name))
        program.chmod(0o755)
        (folder / "usr/local/bin" / name).symlink_to(f"/opt/venv/bin/{name}")
    shutil.rmtree(site / "bin", ignore_errors=True)

"""One boot of a systemd in namespaces of its own, and a pytest run in it.

The systemd is this machine's ("host") or that of another Debian release, whose tree script/tree makes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSIDE = os.environ.get("GMEMD_TEST_BOOTED", "")  # the release
RELEASES = os.environ.get("GMEMD_TEST_RELEASES", "host trixie").split()
REPORTS = Path("/out/reports")  # inside
SOURCE = Path("/usr/src/gmemd")  # inside: what somebody who installs gmemd has before him
WHEELS = Path("/dev/gmemd-test/wheels")  # inside
TIMEOUT = 900  # seconds for the boot and all that runs in it
HUGE_PAGES = 4  # that the tests in there need

_PROGRAMS = ("unshare", "setpriv", "timeout", "systemctl", "systemd-analyze", "systemd-sysusers",
             "systemd-tmpfiles")
_TREE, _SITE, _PYTHON = (f"/dev/gmemd-test/{name}" for name in ("tree", "site", "python"))  # inside

# $1 is the tree; its programs may be run where it is this machine's own.
_SETUP = """#!/bin/sh
set -eu
tree=$1
cat >"$tree/usr/bin/gmemd-python" <<'EOF'
#!/bin/sh
export PYTHONPATH={tree}:{site} LD_LIBRARY_PATH={lib}
exec {python} -P "$@"
EOF
chmod 755 "$tree/usr/bin/gmemd-python"
[ ! -e /dev/kvm ] || mknod -m 660 "$tree/dev/kvm" c 10 232
"""

# What a package would do.
_PACKAGE = """
cat >"$tree/usr/bin/gmemd" <<'EOF'
#!/bin/sh
exec gmemd-python -m gmemd "$@"
EOF
chmod 755 "$tree/usr/bin/gmemd"
cd "$tree{tree}/systemd"
install -D -m 644 -t "$tree/usr/lib/systemd/system" gmemd.service gmemd.socket
install -D -m 644 -t "$tree/usr/lib/sysusers.d" sysusers.d/gmemd.conf
install -D -m 644 -t "$tree/usr/lib/tmpfiles.d" tmpfiles.d/gmemd.conf
systemd-sysusers --root "$tree" gmemd.conf
systemctl --root "$tree" --quiet enable gmemd.socket
[ ! -e /dev/kvm ] || chown "0:$(awk -F: '$1 == "kvm" {{print $3}}' "$tree/etc/group")" "$tree/dev/kvm"
"""

# What somebody does who then follows docs/systemd.md.
_CLONE = """
mkdir -p "$tree{source}"
cd "$tree{tree}"
cp -r pyproject.toml setup.py README.md gmemd systemd docs "$tree{source}"
"""

_RUN = """#!/bin/sh
cd {tree}
export GMEMD_TEST_BOOTED={release} PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # to import them all takes seconds
exec gmemd-python {words}
"""


class MissingError(Exception):
    """What a boot needs and this machine has not."""


@dataclass
class Booted:
    """What is left of a boot: all that was said, the exit status of what ran, the lines it wrote to REPORTS."""

    status: int
    log: str
    reports: list[str]


@dataclass
class Reports:
    """What the tests inside had to say."""

    by_test: dict[str, list[dict[str, Any]]]  # reports of a node id, as pytest serializes them
    log: str


def missing() -> str:
    """Return what a boot needs and this machine has not; "" if it has all."""
    if os.getuid() != 0:
        return "root"
    for program in ("/lib/systemd/systemd", *_PROGRAMS):
        if not shutil.which(program):
            return f"{program} (script/packages installs it)"
    unshare = ["unshare", "--mount", "--pid", "--fork", "true"]
    may = subprocess.run(unshare, capture_output=True, check=False).returncode == 0
    return "" if may else "the right to make namespaces"


def run(release: str, tests: Sequence[str], maxfail: int) -> Reports:
    """Boot the systemd of this release, run these tests (node ids) in there, and tell what they reported."""
    needed = made(release)
    plugins = ["-p", "no:cacheprovider", "-p", "pytest_asyncio.plugin"]  # what the settings of this tree name
    words = ["-m", "pytest", *plugins, "--rootdir", _TREE, f"--maxfail={maxfail}", *tests]
    booted = _boot(words, release, _CLONE, {str(WHEELS): str(needed / "wheels")}, (),
                   "/" if release == "host" else str(needed / "root"))
    by_test: dict[str, list[dict[str, Any]]] = {}
    for line in booted.reports:
        report = json.loads(line)
        by_test.setdefault(report["nodeid"], []).append(report)
    return Reports(by_test, f"{booted.log}(status {booted.status})")


def made(release: str) -> Path:
    """Return the directory of what the boot of this release needs, made if it is not there."""
    done = subprocess.run([ROOT / "script" / "tree", release], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHON": sys.executable})
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise MissingError(f"what script/tree {release} makes: {said[-1]}")
    return Path(done.stdout.strip())


def boot(words: Sequence[str], *, mounts: Mapping[str, str], inside: Sequence[str]) -> Booted:
    """Boot this machine's systemd with gmemd installed, and run Python with these arguments in there, in this tree.

    `mounts`: what else to show, where. `inside`: a command that boots it where such things can be seen.
    """
    return _boot(words, "host", _PACKAGE, mounts, inside, "/")


def _boot(words: Sequence[str], release: str, install: str, mounts: Mapping[str, str], inside: Sequence[str],
          root: str) -> Booted:
    names = _names() | {"words": shlex.join(words), "release": release}
    with tempfile.TemporaryDirectory(prefix="gmemd-boot-") as directory:
        out = Path(directory)
        shown = "".join(f"{source} {target}\n" for target, source in (_mounts() | dict(mounts)).items())
        (out / "mounts").write_text(shown)
        for name, text in ("setup", _SETUP + install), ("run", _RUN):
            (out / name).write_text(text.format(**names))
            (out / name).chmod(0o755)
        _compile()
        done = subprocess.run([*inside, HERE / "boot.sh", out], capture_output=True, text=True, check=False,
                              env={**os.environ, "TIMEOUT": str(TIMEOUT), "ROOT": root})
        log = (out / "log").read_text(errors="replace") if (out / "log").exists() else ""
        reports = (out / REPORTS.name).read_text().splitlines() if (out / REPORTS.name).exists() else []
    return Booted(done.returncode, f"{log}{done.stdout}{done.stderr}", reports)


def _mounts() -> dict[str, str]:
    # The Python of the tests may lie where others cannot see it, or not be in the tree at all.
    return {_TREE: str(ROOT), _SITE: sysconfig.get_path("purelib"), _PYTHON: sys.base_prefix}


def _names() -> dict[str, str]:
    python = f"{_PYTHON}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    # that of a distribution finds its libraries in the tree
    library = "" if sys.base_prefix.startswith("/usr") else f"{_PYTHON}/lib"
    return {"tree": _TREE, "site": _SITE, "python": python, "lib": library, "source": str(SOURCE)}


def _compile() -> None:
    """Compile the package: inside its directory is read-only, and each start would pay for it."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", ROOT / "gmemd"], check=True)


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Reserve huge pages (2 MiB) for all boots at once, where the machine lets us; the number is put back."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    with contextlib.suppress(OSError):
        pool.write_text(str(before + HUGE_PAGES * len(RELEASES)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            pool.write_text(str(before))

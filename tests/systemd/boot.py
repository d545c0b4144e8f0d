"""One boot of this machine's systemd with gmemd of this tree installed, and a pytest run in it."""

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
INSIDE = "GMEMD_TEST_BOOTED" in os.environ
REPORTS = Path("/out/reports")  # inside
TIMEOUT = 900  # seconds for the boot and all that runs in it
HUGE_PAGES = 4  # that the tests in there need

_PROGRAMS = ("unshare", "setpriv", "timeout", "systemctl", "systemd-analyze", "systemd-sysusers",
             "systemd-tmpfiles")
_TREE, _SITE, _PYTHON = "/opt/gmemd/tree", "/opt/gmemd/site", "/opt/gmemd/python"  # inside

# What a package would do. $1 is the tree; its programs may be run, it is this machine's own.
_SETUP = """#!/bin/sh
set -eu
tree=$1
cat >"$tree/usr/bin/gmemd-python" <<'EOF'
#!/bin/sh
export PYTHONPATH={tree}:{site} LD_LIBRARY_PATH={lib}
exec {python} -P "$@"
EOF
cat >"$tree/usr/bin/gmemd" <<'EOF'
#!/bin/sh
exec gmemd-python -m gmemd "$@"
EOF
chmod 755 "$tree/usr/bin/gmemd-python" "$tree/usr/bin/gmemd"
cd "$tree{tree}/systemd"
install -D -m 644 -t "$tree/usr/lib/systemd/system" gmemd.service gmemd.socket
install -D -m 644 -t "$tree/usr/lib/sysusers.d" sysusers.d/gmemd.conf
install -D -m 644 -t "$tree/usr/lib/tmpfiles.d" tmpfiles.d/gmemd.conf
systemd-sysusers --root "$tree" gmemd.conf
systemctl --root "$tree" --quiet enable gmemd.socket
if [ -e /dev/kvm ]; then
    mknod -m 660 "$tree/dev/kvm" c 10 232
    chown "0:$(awk -F: '$1 == "kvm" {{print $3}}' "$tree/etc/group")" "$tree/dev/kvm"
fi
"""

_RUN = """#!/bin/sh
cd {tree}
export GMEMD_TEST_BOOTED=1
exec gmemd-python {words}
"""


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


def run(tests: Sequence[str], maxfail: int) -> Reports:
    """Boot, run these tests (node ids) in there, and tell what they reported."""
    words = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir", _TREE, f"--maxfail={maxfail}", *tests]
    with _huge_pages():
        booted = boot(words)
    by_test: dict[str, list[dict[str, Any]]] = {}
    for line in booted.reports:
        report = json.loads(line)
        by_test.setdefault(report["nodeid"], []).append(report)
    return Reports(by_test, f"{booted.log}(status {booted.status})")


def boot(words: Sequence[str], *, mounts: Mapping[str, str] | None = None, inside: Sequence[str] = ()) -> Booted:
    """Boot, and run Python with these arguments in there, in this tree.

    `mounts`: what else to show, where. `inside`: a command that boots it where such things can be seen.
    """
    names = _names() | {"words": shlex.join(words)}
    with tempfile.TemporaryDirectory(prefix="gmemd-boot-") as directory:
        out = Path(directory)
        shown = "".join(f"{source} {target}\n" for target, source in (_mounts() | dict(mounts or {})).items())
        (out / "mounts").write_text(shown)
        for name, text in ("setup", _SETUP), ("run", _RUN):
            (out / name).write_text(text.format(**names))
            (out / name).chmod(0o755)
        _compile()
        done = subprocess.run([*inside, HERE / "boot.sh", out], capture_output=True, text=True, check=False,
                              env={**os.environ, "TIMEOUT": str(TIMEOUT)})
        log = (out / "log").read_text(errors="replace") if (out / "log").exists() else ""
        reports = (out / REPORTS.name).read_text().splitlines() if (out / REPORTS.name).exists() else []
    return Booted(done.returncode, f"{log}{done.stdout}{done.stderr}", reports)


def _mounts() -> dict[str, str]:
    mounts = {_TREE: str(ROOT), _SITE: sysconfig.get_path("purelib")}
    if not sys.base_prefix.startswith("/usr"):
        mounts[_PYTHON] = sys.base_prefix  # it may lie in a home directory, which the daemon cannot see
    return mounts


def _names() -> dict[str, str]:
    prefix = sys.base_prefix if sys.base_prefix.startswith("/usr") else _PYTHON
    python = f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return {"tree": _TREE, "site": _SITE, "python": python, "lib": f"{prefix}/lib"}


def _compile() -> None:
    """Compile the package: inside its directory is read-only, and each start would pay for it."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", ROOT / "gmemd"], check=True)


@contextlib.contextmanager
def _huge_pages() -> Iterator[None]:
    """Reserve some huge pages (2 MiB) where the machine lets us; the number is put back."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    with contextlib.suppress(OSError):
        pool.write_text(str(before + HUGE_PAGES))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            pool.write_text(str(before))

"""Whether memory in systemd's fd store is carried into another kernel by kexec: a live update (LUO).

It takes a kernel with CONFIG_LIVEUPDATE_MEMFD that was started with kho=on liveupdate=on, and systemd 261. The device
node is hidden from a service with PrivateDevices=yes, so what /sys shows counts as well.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from typing import Final, Literal

VERSION: Final = 261  # of systemd, from which its store is carried

Verdict = tuple[Literal["yes", "no", "unknown"], str]  # and advice, where it is not yes

_OPTION: Final = "CONFIG_LIVEUPDATE_MEMFD"
_PARAMETERS: Final = "kho=on liveupdate=on"
NEEDED: Final = (f"live update needs a kernel with {_OPTION}, {_PARAMETERS} on its command line "
                 f"and systemd {VERSION}")
_SHOWN: Final = ("/dev/liveupdate", "/sys/class/misc/liveupdate")


def is_on(root: str = "") -> bool:
    """Whether this kernel was started with live update; `root`: of what it shows."""
    return any(os.path.exists(root + path) for path in _SHOWN)


def judge(version: int, root: str = "") -> Verdict:
    """Whether a memfd is carried; `version`: systemd's, 0: unknown. Reads files."""
    config = _config(root)
    built = None if config is None else f"\n{_OPTION}=y\n" in f"\n{config}"
    on = is_on(root)
    needed = []
    if built is False or (built is None and not on):
        needed.append(f"a kernel with {_OPTION}")
    if not on:
        needed.append(f"{_PARAMETERS} on its command line" if needed else f"{_PARAMETERS} on the kernel's command line")
    if 0 < version < VERSION:
        needed.append(f"systemd {VERSION} (this is {version})")
    if needed:
        return "no", f"live update needs {', '.join(needed)}"
    if built is None:
        return "unknown", f"the kernel does not show its configuration: see whether it has {_OPTION}"
    return ("yes", "") if version else ("unknown", f"systemd does not say its version: {VERSION} is needed")


def holes(fds: Iterable[int | str]) -> int:
    """How many bytes a live update allocates for these files, by descriptor or path: it fills each hole."""
    files = {}
    for fd in fds:
        status = os.stat(fd)
        files[status.st_dev, status.st_ino] = max(0, status.st_size - status.st_blocks * 512)
    return sum(files.values())


def _config(root: str) -> str | None:
    """The kernel's configuration; None: it cannot be read."""
    release = os.uname().release
    try:
        with open(f"{root}/proc/config.gz", "rb") as packed:
            return zlib.decompress(packed.read(), wbits=16 + zlib.MAX_WBITS).decode()
    except (OSError, ValueError, zlib.error):
        pass
    for path in (f"/boot/config-{release}", f"/lib/modules/{release}/config"):
        try:
            with open(root + path) as file:
                return file.read()
        except (OSError, ValueError):
            continue
    return None

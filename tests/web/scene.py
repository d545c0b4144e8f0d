"""A host as it could be, for pictures: virtual machines of several kinds, some of them working.

    python -m tests.web.scene PICTURE [light|dark [WIDTH HEIGHT]]

Writes a picture of its status page with headless Chromium.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selenium.webdriver.support.ui import WebDriverWait

from gmemd.client.client import Client
from tests.web.chromium import chromium, emulate
from tests.web.site import Site

MIB = 1 << 20
MACHINES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("web-01", "memory-backend-memfd", 64, {}),
    ("web-02", "memory-backend-memfd", 64, {"prealloc": True}),
    ("db-primary", "memory-backend-guest-memfd", 128, {}),
    ("db-replica", "memory-backend-guest-memfd", 128, {}),
    ("cvm-payments", "memory-backend-guest-memfd", 96, {"init-shared": False}),
    ("scratch", "memory-backend-ram", 16, {}),
    ("shm-bus", "memory-backend-shm", 8, {}),
)
# What is written where, in 64ths of an object: (from, to)
WRITTEN = {"web-01": [(0, 20), (28, 31), (60, 64)], "db-primary": [(0, 44), (50, 52)], "db-replica": [(0, 30)],
           "cvm-payments": [(0, 40)], "scratch": [(0, 3)]}
PRIVATE = {"db-primary": [(8, 30)], "db-replica": [(4, 26)]}
SHARED = {"cvm-payments": [(0, 4), (20, 22), (56, 64)]}


def furnish(client: Client, held: ExitStack) -> None:
    """Make the objects and use them; who holds memory does so until `held` is closed."""
    vmm = Path(held.enter_context(TemporaryDirectory())) / "vmm"
    vmm.symlink_to("/bin/sleep")
    for name, kind, size, more in MACHINES:
        client.execute("object-add", {"qom-type": kind, "id": name, "size": size * MIB, **more})
    for name, parts in SHARED.items():
        _convert(client, name, parts, "shared")
    for name, parts in WRITTEN.items():
        _write(client, name, parts, vmm, held)
    for name, parts in PRIVATE.items():
        _convert(client, name, parts, "private")
    client.execute("memdev-verify", {"job-id": "check-db", "id": "db-primary"})
    client.execute("memdev-populate", {"job-id": "fill-bus", "id": "shm-bus"})


def _convert(client: Client, name: str, parts: list[tuple[int, int]], to: str) -> None:
    unit = _size(name) // 64
    for start, end in parts:
        client.execute("memdev-convert", {"id": name, "offset": start * unit, "size": (end - start) * unit, "to": to,
                                          "preserve": True})


def _write(client: Client, name: str, parts: list[tuple[int, int]], vmm: Path, held: ExitStack) -> None:
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    unit = _size(name) // 64
    with mmap.mmap(fd, _size(name)) as memory:
        for start, end in parts:
            for page in range(start * unit, end * unit, mmap.PAGESIZE):
                memory[page] = 1
    holder = held.enter_context(subprocess.Popen([vmm, "1000"], pass_fds=[fd]))
    held.callback(holder.kill)
    os.close(fd)


def _size(name: str) -> int:
    return next(size for found, _, size, _ in MACHINES if found == name) * MIB


@contextmanager
def scene() -> Iterator[Site]:
    """The daemon with everything in it."""
    with (Site("--keeper", "--name", "host-17", tcp=True, persist="on") as site, ExitStack() as held,
          site.client() as client):
        furnish(client, held)
        yield site


def picture(driver: Any, url: str, file: Path) -> None:
    """Take a picture of a whole page, once it is live."""
    driver.get(url)
    WebDriverWait(driver, 20).until(lambda driver: driver.find_element("id", "live").text == "live")
    height = driver.execute_script("return document.documentElement.scrollHeight")
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": {
        "x": 0, "y": 0, "width": driver.execute_script("return innerWidth"), "height": height, "scale": 1}})
    file.write_bytes(b64decode(shot["data"]))


def main() -> None:
    file, scheme = Path(sys.argv[1]), (sys.argv[2:] or ["light"])[0]
    width, height = [int(word) for word in sys.argv[3:5]] or (0, 0)
    with scene() as site, chromium() as driver:
        emulate(driver, scheme=scheme, width=width, height=height)
        picture(driver, site.url, file)


if __name__ == "__main__":
    main()

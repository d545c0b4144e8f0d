"""What the lab's kernels boot first: busybox, their modules in the order of loading, /init, and this tree of gmemd."""

from __future__ import annotations

import lzma
import os
import re
import stat
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.kernel.lab.kernels import Kernel
from tests.kernel.lab.root import TREE, busybox

# KVM, the disk; names that a kernel has not, or built in, are left out
_MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "ext4", "kvm_amd")
_FOLDERS = ("bin", "dev", "lab", "modules", "proc", "root", "run", "sys")
_HEAD = "070701" + "{:08x}" * 13

Entry = tuple[str, int, bytes]  # name, mode, contents (of a link: where to)


def archive(kernel: Kernel, command: str) -> bytes:
    """The initramfs that runs `command` (of /bin/sh) in the disk's system, with the tree as /opt/gmemd."""
    entries: list[Entry] = [(name, stat.S_IFDIR | 0o755, b"") for name in _FOLDERS]
    entries += [("bin/busybox", stat.S_IFREG | 0o755, busybox().read_bytes()),
                ("init", stat.S_IFREG | 0o755, Path(__file__).with_name("init").read_bytes()),
                ("lab/bzImage", stat.S_IFREG | 0o644, kernel.image.read_bytes()),
               ("lab/run", stat.S_IFREG | 0o755, f"#!/bin/sh\n{command}\n".encode())]
    entries += drivers(kernel.modules) if kernel.modules else []
    return cpio([*entries, *sources()])


def cpio(entries: Iterable[Entry]) -> bytes:
    """An archive in the form that the kernel unpacks (newc)."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        raw = name.encode() + b"\0"
        out += _HEAD.format(number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0).encode() + raw
        out += b"\0" * (-len(out) % 4) + data
        out += b"\0" * (-len(out) % 4)
    return bytes(out)


def drivers(folder: Path) -> list[Entry]:
    """The modules and all that they need, numbered in the order of loading; each says itself what it needs."""
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in folder.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        name = name.replace("-", "_")
        if name in loaded or name not in files:
            return
        data = _plain(files[name])
        needed = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in filter(None, needed[1].decode().split(",") if needed else ()):
            load(other)
        loaded[name] = data

    for name in _MODULES:
        load(name)
    return [(f"modules/{number:03}-{name}.ko", stat.S_IFREG | 0o644, data)
            for number, (name, data) in enumerate(loaded.items())]


def _plain(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def sources() -> Iterator[Entry]:
    """The files of this tree that git knows or would take, and what tells Python that gmemd is installed."""
    listed = subprocess.run(["git", "-C", TREE, "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True,
                            text=True, check=True).stdout.split("\0")
    paths = [TREE / name for name in listed if name] + [*TREE.glob("gmemd.egg-info/*")]
    folders = {parent for path in paths for parent in path.relative_to(TREE).parents}
    for folder in sorted(folders):
        yield str("lab/gmemd" / folder), stat.S_IFDIR | 0o755, b""
    for path in paths:
        if path.is_symlink() or path.is_file():
            mode = path.lstat().st_mode
            yield (f"lab/gmemd/{path.relative_to(TREE)}", mode,
                   os.fsencode(os.readlink(path)) if stat.S_ISLNK(mode) else path.read_bytes())

"""The lab's own parts that need no machine: the archive that boots, the order of modules, the names of kernels."""

from __future__ import annotations

import lzma
import os
import stat
from pathlib import Path

import pytest

from tests.kernel.lab import initramfs, kernels


def test_an_archive_has_what_was_put_in() -> None:
    """Names, modes and contents, aligned to four bytes, up to the trailer."""
    entries = [("bin", stat.S_IFDIR | 0o755, b""), ("bin/odd", stat.S_IFREG | 0o755, b"12345"),
               ("link", stat.S_IFLNK | 0o777, b"bin/odd")]
    assert [*entries, ("TRAILER!!!", 0, b"")] == read(initramfs.cpio(entries))


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    """Packed or not, and each once; what a kernel does not have is left out."""
    for name, needs, pack in (("kvm-amd.ko.xz", b"kvm,ccp", lzma.compress), ("kvm.ko.xz", b"ccp", lzma.compress),
                              ("ccp.ko", b"", bytes), ("virtio_blk.ko", b"", bytes), ("other.ko", b"", bytes)):
        (tmp_path / name).write_bytes(pack(b"\x7fELF\0license=GPL\0depends=" + needs + b"\0"))
    names = [name for name, _, _ in initramfs.drivers(tmp_path)]
    assert names == ["modules/000-virtio_blk.ko", "modules/001-ccp.ko", "modules/002-kvm.ko", "modules/003-kvm_amd.ko"]


def test_the_tree_is_complete() -> None:
    """What git knows, as it is now, with the folders before what is in them."""
    names = [name for name, _, _ in initramfs.sources()]
    assert {"lab/gmemd/gmemd/__init__.py", "lab/gmemd/tests/kernel/lab/init"} <= set(names)
    assert all(os.path.dirname(name) in names[:number] for number, name in enumerate(names) if name != "lab/gmemd")


@pytest.mark.parametrize(("name", "release"), [("7.3", "7.3.4+deb13-amd64"), ("7.3.4", "7.3.4+deb13-amd64"),
                                               ("7.3-amd64", "7.3-amd64"), ("7", "7.3.4+deb13-amd64"), ("luo", "luo"),
                                               ("7.30", None), ("6.1", None)])
def test_a_kernel_is_named_by_the_first_part_of_its_release(name: str, release: str | None) -> None:
    """Numbers are not cut; of several the first, which is the newest."""
    assert release == kernels.chosen(name, ["7.3.4+deb13-amd64", "7.3-amd64", "6.12.117+deb13-amd64", "luo"])


def read(archive: bytes) -> list[tuple[str, int, bytes]]:
    """The entries of an archive, which must be whole."""
    found, at = [], 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[start : start + 8], 16) for start in range(at + 6, at + 110, 8)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        start = at + 110 + length + -(at + 110 + length) % 4
        found.append((name, mode, archive[start : start + size]))
        at = start + size + -(start + size) % 4
    return found

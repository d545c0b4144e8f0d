"""Damage is found, named, and never restored: a flipped bit and a truncation anywhere in any file, a missing file."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.snapshots.manifest import dump, load
from tests.snapshots.engine import MIB, PAGE, contents, do, manifest_of, memfd
from tests.snapshots.here import do_here, restore_here, save_here

SIZE = 3 * MIB + PAGE
PLACES = int(os.environ.get("GMEMD_PLACES", "3"))  # in each file; script/robustness asks for 50
FORMS = ["full", "delta", "parent", "cold"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root for each form, with the snapshot `s` of the same memory, and what the memory was."""
    top = tmp_path_factory.mktemp("originals")
    for form in FORMS:
        root, fd, chance = top / form, memfd(SIZE), random.Random(1)
        root.mkdir()
        os.pwrite(fd, chance.randbytes(MIB // 2), MIB)
        os.pwrite(fd, b"text " * 20000, 2 * MIB + 77)
        if form in ("delta", "parent"):
            save_here(root, "p", fd, state=b"devices" * 1000)
        os.pwrite(fd, b"increment" * 3000, 2 * MIB)
        save_here(root, "s", fd, parent="p" if form in ("delta", "parent") else "", state=b"devices" * 1000)
        if form == "cold":
            do_here("cold", root, "s")
        (top / f"{form}.bytes").write_bytes(contents(fd))
        os.close(fd)
    return top


def judge(root: Path, expected: bytes, file: str, what: str) -> None:
    """`verify` names the file, and a restore either fails or gives what was saved; in no case anything else."""
    with pytest.raises(QmpError) as refusal:
        do_here("verify", root, "s")
    said = refusal.value.desc
    assert file.rpartition("/")[2] in said or "needs its parent 'p'" in said, (what, said)
    assert "damaged" in said or "another one" in said or "not found" in said or "version" in said, (what, said)
    fd = memfd(SIZE)
    try:
        try:
            restore_here(root, "s", fd)
        except QmpError:
            found = contents(fd)
            pages = range(0, SIZE, PAGE)
            assert all([found[at:at + PAGE] in (expected[at:at + PAGE], bytes(PAGE)) for at in pages]), what
        else:
            assert contents(fd) == expected, what
    finally:
        os.close(fd)


def flipped(path: Path, chance: random.Random) -> str:
    """Flip one bit, mostly in what is not a hole."""
    data = bytearray(path.read_bytes())
    at = chance.randrange(len(data))
    if chance.random() < 0.8:
        at = chance.choice([n for n in range(0, len(data), 61) if data[n]] or [at])
    data[at] ^= 1 << chance.randrange(8)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data[at:at + 1])
    return f"bit of byte {at}"


def cut(path: Path, chance: random.Random) -> str:
    length = chance.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"cut to {length}"


def missing(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "missing"


@pytest.mark.parametrize("how", [flipped, cut, missing])
@pytest.mark.parametrize("form", FORMS)
def test_damage_is_found(tmp_path: Path, originals: Path, form: str,
                         how: Callable[[Path, random.Random], str]) -> None:
    """In each file of a snapshot, and, for a delta, of its parent."""
    original, expected = originals / form, (originals / f"{form}.bytes").read_bytes()
    folder, chance = "p" if form == "parent" else "s", random.Random(form + how.__name__)
    if form in ("delta", "parent") and manifest_of(original, "s")["parts"]["memory"]["stored"] != "delta":
        pytest.skip("here, increments are clones of files")
    files = sorted(os.listdir(original / folder))
    assert len(files) == 5
    for file in files:
        if form == "parent" and file == "vmstate":
            continue  # is not needed
        for _ in range(PLACES if how is not missing else 1):
            root = tmp_path / "root"
            shutil.copytree(original, root, symlinks=True)
            what = how(root / folder / file, chance)
            judge(root, expected, file, f"{form} {folder}/{file}: {what}")
            shutil.rmtree(root)


def test_a_later_version_is_refused(tmp_path: Path, originals: Path) -> None:
    """In words; and one that is damaged is found by the worker, too."""
    root = tmp_path / "root"
    shutil.copytree(originals / "full", root)
    path = root / "s" / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(QmpError, match=r"snapshot 's' is damaged: manifest\.json does not match its own sha256"):
        do("verify", root, "s")
    members = load(text.encode(), "s")
    del members["sha256"]
    path.write_bytes(dump({**members, "version": 2}))
    with pytest.raises(QmpError, match="it has version 2 of the format, and this gmemd reads up to 1"):
        do("verify", root, "s")

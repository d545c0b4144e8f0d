"""manifest.json: its JSON Schema and the worker's own check agree, it guards itself, and pages become bits and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import gmemd
from gmemd.errors import QmpError
from gmemd.snapshots import manifest
from gmemd.snapshots.pages import PAGE, differing, filled, from_bits, runs, to_bits
from tests.snapshots.engine import MIB, manifest_of, memfd, save

SCHEMA = json.loads((Path(gmemd.__file__).parent / "schema" / "snapshot.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
HASH = "0123456789abcdef" * 4
PART = {"file": "memory.raw", "stored": "full", "bytes": 0, "map-sha256": HASH, "digests-sha256": HASH}
GOOD: dict[str, Any] = {
    "format": "gmemd-snapshot", "version": 1, "id": manifest.new_id(), "name": "s", "created": "", "writer": "gmemd",
    "object": {"id": "m", "qom-type": "memory-backend-memfd", "size": PAGE, "kind": "memfd", "properties": {}},
    "parts": {"memory": PART, "private": {**PART, "stored": "cold", "file-sha256": HASH}},
    "block-size": 65536, "page-size": 4096, "parent": {"id": "x", "sha256": HASH, "name": "p"},
    "consistency": {"via": "qmp", "consistent": True, "pause-ms": 1}, "generation": 0,
    "device-state": {"file": "vmstate", "bytes": 7, "sha256": HASH, "vmm": "QEMU", "machine": "pc"}, "sha256": HASH}
DELTA: dict[str, Any] = {**GOOD, "parts": {"memory": {**PART, "stored": "delta"}}}
ODD = st.sampled_from([None, True, 0, -1, 1, 4096, 4097, 1 << 63, 65536, 2, "", "x", "../x", HASH, "object", "delta",
                       "stream", "cold", [], {}, {"memory": PART}, {"memory": {"stored": "object", "bytes": 0}}, 1.5])


def paths(value: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [before, *(path for name in value for path in paths(value[name], (*before, name)))] \
        if isinstance(value, dict) else [before]


def changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    """A copy with the member at a path replaced, or, if `new` is ..., removed."""
    if not path:
        return new
    rest = {name: member for name, member in value.items() if name != path[0]}
    if len(path) == 1 and new is ...:
        return rest
    return {**rest, path[0]: changed(value[path[0]], path[1:], new)}


@given(st.sampled_from([(good, path) for good in (GOOD, DELTA) for path in paths(good)[1:]]), ODD | st.just(...))
@example((DELTA, ("parent",)), ...)
@example((DELTA, ("parts", "memory", "stored")), "full")
def test_the_schema_and_the_check_agree(place: tuple[dict[str, Any], tuple[str, ...]], new: Any) -> None:
    """Whatever member is missing or odd."""
    members = changed(*place, new)
    assert VALIDATOR.is_valid(members) == (manifest.check(members) == ""), manifest.check(members)


def test_what_is_written_is_valid(tmp_path: Path) -> None:
    """The manifest of a snapshot, and the example that the other tests change."""
    fd = memfd(MIB)
    save(tmp_path, "s", fd)
    VALIDATOR.validate(manifest_of(tmp_path, "s"))
    for good in (GOOD, DELTA):
        VALIDATOR.validate(good)
        assert manifest.check(good) == ""


def test_every_bit_is_guarded() -> None:
    """The manifest itself has a hash, which covers all of it."""
    text = manifest.dump({name: value for name, value in GOOD.items() if name != "sha256"})
    assert {**manifest.load(text, "s"), "sha256": HASH} == GOOD
    for at in range(len(text)):
        with pytest.raises(QmpError, match="snapshot 's' is damaged: manifest"):
            manifest.load(text[:at] + bytes([text[at] ^ 1]) + text[at + 1:], "s")


def sealed(text: bytes) -> bytes:
    """A file with the right hash, whatever else is in it."""
    return text + b', "sha256": "' + hashlib.sha256(text + b', "sha256": "' + b"0" * 64 + b'"}').hexdigest().encode() \
        + b'"}'


def test_a_manifest_as_long_as_none_is_read() -> None:
    """It is refused where it would be written."""
    with pytest.raises(QmpError, match=r"bytes of manifest\.json, and 16777216 are read"):
        manifest.dump({"name": "s", "object": "x" * (16 << 20)})


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"sha256": "' + b"0" * 64 + b'"}', b"\xff" * 100,
                                  sealed(b'{"x": ' + b"[" * 20000 + b"]" * 20000)], ids=lambda text: text[:9])
def test_what_is_no_manifest(text: bytes) -> None:
    """Never an exception of another kind."""
    with pytest.raises(QmpError):
        manifest.load(text, "s")


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_masks_become_bits_and_back(pages: list[bool]) -> None:
    """The first page is the lowest bit of the first byte; what is filled and what differs is found exactly."""
    mask = bytes(pages)
    bits = to_bits(mask)
    assert [bool(bits[n // 8] >> n % 8 & 1) for n in range(len(pages))] == pages
    assert from_bits(bits, len(pages)) == mask
    data = b"".join(bytes(PAGE - 1) + b"x" if page else bytes(PAGE) for page in pages)
    assert filled(memoryview(data)) == mask
    assert differing(memoryview(data), memoryview(bytes(len(data)))) == mask
    assert b"".join(data[at:at + count] for at, count in runs(mask)) == data.replace(bytes(PAGE), b"") \
        or sum(count for _, count in runs(mask)) == sum(pages) * PAGE

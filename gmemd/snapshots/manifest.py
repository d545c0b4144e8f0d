"""manifest.json: what a snapshot is. It is written last, and guards everything else by hashes, and itself by `sha256`.

`sha256` is that of the file with these 64 digits replaced by zeros; so any flipped bit of it is found.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from typing import Any, Final

from gmemd.errors import QmpError, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots.pages import BLOCK, PAGE

NAME: Final = "manifest.json"
FORMAT: Final = "gmemd-snapshot"
VERSION: Final = 1
WITH_TABLES: Final = ("full", "reflink", "delta", "cold")  # forms of a part that has a map and digests
WITHOUT: Final = "object"  # the form of one whose bytes are in the object itself

_LARGEST: Final = 16 << 20  # bytes
_UNSEALED: Final = "0" * 64
_SEAL: Final = re.compile(rb'"sha256": "([0-9a-f]{64})"\s*\}\s*$')
_OF_VMM: Final = ("vmm", "machine")  # members of a device state
_HASH: Final = re.compile("[0-9a-f]{64}")
_FILE: Final = re.compile("[a-z][a-z.-]*")
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OFFSET_MAX: Final = (1 << 63) - 1


def new_id() -> str:
    """A random UUID."""
    digits = bytearray(os.urandom(16))
    digits[6], digits[8] = digits[6] & 0x0F | 0x40, digits[8] & 0x3F | 0x80
    text = digits.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def dump(members: dict[str, Any]) -> bytes:
    """The file of a manifest without `sha256`; QmpError if none is read that is so long."""
    text = json.dumps({**members, "sha256": _UNSEALED}, indent=2).encode() + b"\n"
    if len(text) > _LARGEST:
        raise QmpError(f"snapshot '{members['name']}' would have {len(text)} bytes of {NAME}, and {_LARGEST} are read:"
                       " what is private in the object is in too many parts")
    before, _, after = text.rpartition(_UNSEALED.encode())
    return before + _sha256(text).encode() + after


def load(text: bytes, name: str) -> dict[str, Any]:
    """The members of a manifest; QmpError if it is damaged, of a later version or not a manifest."""
    seal = _SEAL.search(text)
    if seal is None:
        raise damaged(name, f"{NAME} is incomplete")
    zeros = text[:seal.start(1)] + _UNSEALED.encode() + text[seal.end(1):]
    if _sha256(zeros).encode() != seal[1]:
        raise damaged(name, f"{NAME} does not match its own sha256")
    try:
        members = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise damaged(name, f"{NAME} is not JSON") from exc
    problem = check(members)
    if problem:
        raise QmpError(f"snapshot '{name}': {problem}")
    assert isinstance(members, dict)
    return members


def read(folder: int, name: str) -> tuple[dict[str, Any], str]:
    """(members, sha256 of the file) of the manifest in a folder."""
    with os_errors(f"cannot read {NAME} of snapshot '{name}'"):
        try:
            fd = open_beneath(folder, NAME, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise damaged(name, f"{NAME} is missing") from None
        try:
            text = os.pread(fd, _LARGEST, 0)
        finally:
            os.close(fd)
    return load(text, name), _sha256(text)


def _sha256(text: bytes) -> str:
    """The digest of a text, by Python's own function where it has one: hashlib loads OpenSSL, 4 MiB and 5 ms."""
    for name in ("_sha2", "_sha256", "hashlib"):  # from Python 3.12 on; before; a build without them
        with contextlib.suppress(ImportError):
            digest: str = importlib.import_module(name).sha256(text).hexdigest()
            return digest
    raise AssertionError("Python has no SHA-256")


def damaged(name: str, what: str) -> QmpError:
    """The error of a snapshot that does not hold what was saved."""
    return QmpError(f"snapshot '{name}' is damaged: {what}")


def check(members: Any) -> str:
    """What is wrong with a manifest's form, "" if nothing: what gmemd/schema/snapshot.json says, without jsonschema."""
    if not isinstance(members, dict) or members.get("format") != FORMAT:
        return f"{NAME} is not that of a snapshot"
    version = members.get("version")
    if type(version) is not int or version < 1:
        return f"{NAME} has no version"
    if version > VERSION:
        return f"it has version {version} of the format, and this gmemd reads up to {VERSION}"
    for name, good in _MEMBERS.items():
        if name in members and not good(members[name]):
            return f"member '{name}' of {NAME} is not valid"
    is_delta = any([part["stored"] == "delta" for part in members.get("parts", {}).values()])
    missing = [name for name in (*_REQUIRED, *(("parent",) if is_delta else ())) if name not in members]
    return f"{NAME} lacks member '{missing[0]}'" if missing else ""


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _OFFSET_MAX


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 64 and _FILE.fullmatch(value) is not None


def _is_object(value: Any) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("id"), str) and isinstance(value.get("qom-type"), str)
            and _is_number(value.get("size")) and value["size"] > 0 and value["size"] % PAGE == 0
            and isinstance(value.get("properties", {}), dict) and isinstance(value.get("kind", ""), str))


def _is_part(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_number(value.get("bytes")):
        return False
    if value.get("stored") == WITHOUT:
        return True
    return (value.get("stored") in WITH_TABLES and _is_file(value.get("file"))
            and all([_is_hash(value.get(name)) for name in ("map-sha256", "digests-sha256")])
            and (value["stored"] != "cold" or _is_hash(value.get("file-sha256"))))


def _are_parts(value: Any) -> bool:
    return (isinstance(value, dict) and "memory" in value and set(value) <= {"memory", "private"}
            and all([_is_part(part) for part in value.values()])
            and (value.get("private", {}).get("stored") != WITHOUT))


def _is_parent(value: Any) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("id"), str) and _is_hash(value.get("sha256"))
            and isinstance(value.get("name"), str))


def _is_consistency(value: Any) -> bool:
    return (isinstance(value, dict) and isinstance(value.get("via"), str)
            and isinstance(value.get("consistent"), bool) and _is_number(value.get("pause-ms", 0)))


def _is_state(value: Any) -> bool:
    return (isinstance(value, dict) and _is_file(value.get("file")) and _is_number(value.get("bytes"))
            and _is_hash(value.get("sha256")) and all([isinstance(value.get(name, ""), str) for name in _OF_VMM]))


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_MEMBERS: Final = {
    "id": _is_id, "name": _is_text, "created": _is_text, "writer": _is_text, "object": _is_object,
    "parts": _are_parts, "block-size": lambda value: value == BLOCK and type(value) is int,
    "page-size": lambda value: value == PAGE and type(value) is int, "parent": _is_parent,
    "consistency": _is_consistency, "generation": _is_number, "device-state": _is_state, "sha256": _is_hash,
}
_REQUIRED: Final = ("id", "name", "created", "writer", "object", "parts", "block-size", "page-size", "consistency",
                    "generation", "sha256")

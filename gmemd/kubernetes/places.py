"""A claim's files on the node: its directory, the CDI specification by which containers get it, and the metadata.

Everything is written beside its place and renamed, so it is there whole or not at all, and writing it again changes
nothing. Formats: the CDI specification (cncf.io/container-device-interface), and the device metadata protocol of
KEP-5304 (metadata.resource.k8s.io).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from gmemd.errors import QmpError, os_errors
from gmemd.kubernetes.claims import Claim, Portion
from gmemd.kubernetes.quantity import write

KIND: Final = "gmemd.example/claim"
# where containers find the directories of their claims; /run/gmemd of our own image is closed to other users
INSIDE: Final = "/run/gmemd-claims"
SOCKET: Final = "qmp.sock"
_CDI_VERSION: Final = "0.5.0"  # the first in which a device's name may begin with a digit, as uids do
_METADATA: Final = "/var/run/kubernetes.io/dra-device-attributes"
_METADATA_VERSIONS: Final = ("metadata.resource.k8s.io/v1beta1", "metadata.resource.k8s.io/v1alpha1")
_READ_ONLY: Final = ["ro", "nosuid", "nodev", "noexec", "bind"]
_UID: Final = re.compile(r"[A-Za-z0-9-]{1,63}")


class Places:
    """Where the files of claims are: `claims` for their directories, `cdi` for specifications.

    `owner`: user and group of gmemd, who listens in the directories; on the node nobody else may enter them.
    """

    def __init__(self, claims: Path, cdi: Path, driver: str) -> None:
        self._claims = claims
        self._cdi = cdi
        self._driver = driver

    def open(self, owner: tuple[int, int]) -> None:
        """Create the directories that all claims share."""
        with os_errors(f"cannot create '{self._claims}' or '{self._cdi}'"):
            self._claims.mkdir(parents=True, exist_ok=True)
            os.chown(self._claims, -1, owner[1])
            self._claims.chmod(0o710)
            self._cdi.mkdir(parents=True, exist_ok=True)
        self._owner = owner

    @contextmanager
    def held(self, uid: str) -> Iterator[Path]:
        """The directory of a claim, held against other threads and instances of the driver; blocks until it is.

        It is created if needed, and removed in the end if it is empty.
        """
        if not _UID.fullmatch(uid):
            raise QmpError(f"'{uid}' is not the uid of a claim")
        path = self._claims / uid
        if not self._claims.exists():  # it is in gmemd's directory, which somebody may have emptied
            self.open(self._owner)
        with os_errors(f"cannot use '{path}'"):
            fd = self._lock(path)
            self._hand_over(fd)
        try:
            yield path
        finally:
            with suppress(OSError):
                path.rmdir()
            os.close(fd)

    def _hand_over(self, fd: int) -> None:
        """Let gmemd listen in a directory and containers enter it; the mode first, while it is still ours."""
        status = os.fstat(fd)
        if status.st_mode & 0o777 != 0o755:
            os.fchmod(fd, 0o755)
        if (status.st_uid, status.st_gid) != self._owner:
            os.chown(fd, *self._owner)

    def _lock(self, path: Path) -> int:
        """A descriptor of the directory at that path, locked; what was removed meanwhile is not it."""
        while True:
            with suppress(FileExistsError):
                path.mkdir()
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
            os.close(fd)

    def write(self, claim: Claim) -> None:
        """Write the metadata of each request, then the CDI devices that mount it with the claim's directory."""
        with os_errors(f"cannot write the files of claim '{claim.uid}'"):
            for request in dict.fromkeys(one.base for one in claim.portions):
                portions = [one for one in claim.portions if one.base == request]
                _replace(self._metadata_file(claim, request), "".join(
                    json.dumps(self._metadata(claim, portions, version), indent=2) + "\n"
                    for version in _METADATA_VERSIONS))
            _replace(self._specification(claim.uid), json.dumps(self._cdi_spec(claim), indent=2) + "\n")

    def forget(self, uid: str) -> None:
        """Remove the CDI devices, so that no new container gets the claim."""
        with os_errors(f"cannot remove '{self._specification(uid)}'"):
            self._specification(uid).unlink(missing_ok=True)

    def clear(self, path: Path) -> None:
        """Remove what is in a claim's directory, which is held."""
        with os_errors(f"cannot remove the files in '{path}'"):
            for entry in os.scandir(path):
                shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)

    def _specification(self, uid: str) -> Path:
        return self._cdi / f"{KIND.replace('/', '-')}_{uid}.json"

    def _metadata_file(self, claim: Claim, request: str) -> Path:
        return self._claims / claim.uid / f"{request}-metadata.json"

    def _cdi_spec(self, claim: Claim) -> dict[str, Any]:
        inside = f"{INSIDE}/{claim.uid}"
        directory = {"hostPath": str(self._claims / claim.uid), "containerPath": inside, "options": _READ_ONLY}
        known = (f"resourceclaimtemplates/{claim.pod_claim}" if claim.pod_claim else f"resourceclaims/{claim.name}")
        requests = dict.fromkeys(one.base for one in claim.portions)
        return {"cdiVersion": _CDI_VERSION, "kind": KIND, "devices": [
            {"name": f"{claim.uid}_{request}", "containerEdits": {
                "env": [f"GMEMD_SOCKET={inside}/{SOCKET}"],
                "mounts": [directory, {
                    "hostPath": str(self._metadata_file(claim, request)),
                    "containerPath": f"{_METADATA}/{known}/{request}/{self._driver}-metadata.json",
                    "options": _READ_ONLY}]}} for request in requests]}

    def _metadata(self, claim: Claim, portions: list[Portion], version: str) -> dict[str, Any]:
        """A DeviceMetadata of one request."""
        named: dict[str, Any] = {"podClaimName": claim.pod_claim} if claim.pod_claim else {}
        return {"kind": "DeviceMetadata", "apiVersion": version,
                "metadata": {"name": claim.name, "namespace": claim.namespace, "uid": claim.uid, "generation": 1},
                **named,
                "requests": [{"name": portions[0].request, "devices": [
                    {"driver": self._driver, "pool": one.pool, "name": one.device.name,
                     "attributes": _attributes(claim, one)} for one in portions]}]}


def cdi_name(claim: Claim, portion: Portion) -> str:
    """The CDI device of a portion's request."""
    return f"{KIND}={claim.uid}_{portion.base}"


def _attributes(claim: Claim, portion: Portion) -> dict[str, Any]:
    return {"socket": {"string": f"{INSIDE}/{claim.uid}/{SOCKET}"}, "id": {"string": portion.id},
            "size": {"int": portion.size}, "pageSize": {"string": write(portion.device.page_size)},
            "type": {"string": portion.parameters["type"]},
            "resource.kubernetes.io/numaNode": {"int": portion.device.numa_node}}


def _replace(path: Path, text: str) -> None:
    """Write a file whole. The directory is gmemd's, and we may be root: no link that is there is followed."""
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o644)
    beside.rename(path)

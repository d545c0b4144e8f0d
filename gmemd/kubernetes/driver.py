"""What the driver does for a claim: brings gmemd and the node's files to what the claim is, or to nothing.

The rooms in gmemd, with the notes of what they were made for, are all that is remembered. Each step looks at what is
there and does what is missing, so it does not matter where an earlier attempt ended, or who ended: the driver, gmemd
or the kubelet.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gmemd.client.client import Client
from gmemd.errors import QmpError
from gmemd.kubernetes.claims import Claim, Portion, creation, saved_as
from gmemd.kubernetes.house import House, exists, find_room
from gmemd.kubernetes.parameters import ORIGINS
from gmemd.kubernetes.places import SOCKET, Places


class Driver:
    """Prepares and releases claims; every method blocks. `bind`: whether memory is bound to its NUMA node."""

    def __init__(self, house: House, places: Places, *, bind: bool, say: Callable[[str], None]) -> None:
        self._house = house
        self._places = places
        self._bind = bind
        self._say = say

    def prepare(self, claim: Claim) -> None:
        """Give a claim its room with its socket and its memory, and the files by which containers get both.

        QmpError with the sentence of gmemd if it refuses; a later call goes on.
        """
        with self._places.held(claim.uid) as directory:
            self._house.ask(lambda client: self._furnish(client, claim, directory))
            self._places.write(claim)

    def release(self, uid: str, *, deleted: bool = False) -> None:
        """Do with a claim's memory what its parameters say; `deleted`: the claim is, so nothing is kept for it.

        QmpError if a process still has the memory mapped: a later call goes on. One that is not known is done.
        """
        with self._places.held(uid) as directory:
            if self._house.ask(lambda client: self._vacate(client, uid, deleted)):
                self._places.clear(directory)

    def rooms(self) -> list[tuple[str, dict[str, Any]]]:
        """The rooms of claims in this gmemd: uid and note."""
        return [(room["id"], note) for room in self._house.ask(lambda client: client.execute("query-memdev-rooms"))
                if (note := read_note(room)) is not None]

    def _furnish(self, client: Client, claim: Claim, directory: Path) -> None:
        wanted = {"id": claim.uid, "socket": str(directory / SOCKET), "namespace": claim.namespace,
                  "note": json.dumps(claim.note(), separators=(",", ":"))}
        try:
            client.execute("memdev-room-add", wanted)
        except QmpError:
            room = find_room(client, claim.uid)
            if room is None:
                raise
            if not self._same(client, claim, room):
                client.execute("memdev-room-add", wanted)
        if not (directory / SOCKET).is_socket():
            raise QmpError(f"the socket in '{directory}' was removed: gmemd creates it again when it is restarted")
        made: list[str] = []
        try:
            for portion in claim.portions:
                self._create(client, claim, portion, made)
        except QmpError:  # a refusal leaves nothing
            for name in made:
                with suppress(QmpError):
                    client.execute("object-del", {"id": name})
            with suppress(QmpError):
                client.execute("memdev-room-del", {"id": claim.uid})
            raise

    def _create(self, client: Client, claim: Claim, portion: Portion, made: list[str]) -> None:
        """Create a portion's object if there is none; `made`: add its name then."""
        name = f"{portion.id}@{claim.uid}"
        if not exists(client, name):
            command, arguments = creation(portion, claim.uid, bind=self._bind)
            client.execute(command, arguments)
            made.append(name)
        if set(ORIGINS) & portion.parameters.keys():
            _check_fits(client, portion, name)

    def _same(self, client: Client, claim: Claim, room: dict[str, Any]) -> bool:
        """Whether a room is for this allocation; if it was for an earlier one of the claim, it is vacated."""
        note = read_note(room)
        if note is None:
            raise QmpError(f"room '{claim.uid}' was not made by this driver")
        if note == claim.note():
            return True
        if not self._vacate(client, claim.uid, deleted=False):
            raise QmpError(f"claim '{claim.namespace}/{claim.name}' keeps memory of an earlier allocation, which was "
                           "another: delete the claim to free it")
        return False

    def _vacate(self, client: Client, uid: str, deleted: bool) -> bool:
        """Empty and remove a room, but for what is kept; whether nothing is left."""
        room = find_room(client, uid)
        note = None if room is None else read_note(room)
        if note is None:
            self._places.forget(uid)
            return room is None
        present = [one for one in note["portions"] if exists(client, f"{one['id']}@{uid}")]
        leaving = [one for one in present if deleted or one["onRelease"] != "keep"]
        for portion in leaving:
            if "clone" not in portion:  # whose pages are its template's, and stay
                _check_unmapped(client, f"{portion['id']}@{uid}")
        self._places.forget(uid)
        for portion in leaving:
            if portion["onRelease"] == "snapshot":
                save(client, f"{portion['id']}@{uid}", saved_as(note["namespace"], note["claim"], portion["id"]))
            client.execute("object-del", {"id": f"{portion['id']}@{uid}"})
        if len(leaving) < len(present):
            return False
        client.execute("memdev-room-del", {"id": uid})
        return True


def read_note(room: dict[str, Any]) -> dict[str, Any] | None:
    """What a room was made for; None: not for a claim."""
    try:
        note = json.loads(room.get("note", ""))
        return note if isinstance(note, dict) and "portions" in note else None
    except ValueError:
        return None


def save(client: Client, name: str, snapshot: str) -> None:
    """Save an object; an older snapshot of the same claim makes room, because the object is what came of it."""
    if any(one["name"] == snapshot for one in client.execute("query-memdev-snapshots")):
        client.execute("memdev-snapshot-delete", {"name": snapshot})
    client.execute("memdev-snapshot", {"id": name, "name": snapshot})


def _check_fits(client: Client, portion: Portion, name: str) -> None:
    """Delete an object that came with a size or pages of its own, and refuse it, if they are not what is allocated."""
    [answer] = client.execute("qom-list-get", {"paths": [f"/objects/{name}"]})
    there = {row["name"]: row.get("value") for row in answer["properties"]}
    pages = there.get("hugetlbsize", 0) if there.get("hugetlb") else 0
    if there["size"] <= portion.size and pages == (portion.device.page_size if portion.device.huge else 0):
        return
    client.execute("object-del", {"id": name})
    source = next(portion.parameters[name] for name in ORIGINS if name in portion.parameters)
    raise QmpError(f"the memory of '{source}' has {there['size']} bytes{' of huge pages' if pages else ''}, and the "
                   f"claim has {portion.size} bytes of device '{portion.device.name}'")


def _check_unmapped(client: Client, name: str) -> None:
    users = [one for one in client.execute("query-memdev-holders", {"id": name}) if one["mapped"]]
    if users:
        who = ", ".join(f"{one['pid']} ({one['comm']})" for one in users[:3])
        raise QmpError(f"object '{name}' is still mapped by process {who}: it is deleted when no process maps it")

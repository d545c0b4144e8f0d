"""Memory that outlasts its users is found again, or made."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.client.obtain import obtain
from gmemd.errors import QmpError
from tests.daemon import Daemon
from tests.patience import PATIENCE

WANTED = {"qom-type": "memory-backend-memfd", "id": "x", "size": 4096, "share": True}


def inode(client: Client, **other: Any) -> int:
    """That of the memory which is obtained."""
    fd, info = obtain(client, WANTED | other)
    try:
        assert info["size"] == 4096
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def test_made_once(daemon: Daemon) -> None:
    """Whoever comes again has the same memory, prepared as it is wanted now."""
    with daemon.client() as client:
        first = inode(client)
    with daemon.client() as client:
        assert inode(client, prealloc=True) == first
        assert client.execute("qom-get", {"path": "/objects/x", "property": "prealloc"}) is True
        assert inode(client, dump=False) == first


def test_another_object_is_not_taken(daemon: Daemon) -> None:
    """It is refused with the property in which it differs; what was not asked for may be as it is."""
    with daemon.client() as client:
        first = inode(client, seal=False)
        for other, value in (("size", 8192), ("share", False), ("qom-type", "memory-backend-ram")):
            with pytest.raises(QmpError) as caught:
                inode(client, **{other: value})
            assert caught.value.desc == \
                f"object 'x' is left from an earlier run with another '{other}': delete it first"
        assert inode(client) == first


def test_what_was_made_in_vain_is_deleted(tmp_path: Path) -> None:
    """An object that is made, and then not handed out, does not stay at the daemon."""
    asked: list[str] = []

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb", buffering=0) as stream:
            stream.write(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
            while line := stream.readline():
                request = json.loads(line)
                asked.append(request["execute"])
                refusals = {"qom-list-get": "DeviceNotFound", "memdev-get-fd": "GenericError"}
                error = refusals.get(request["execute"])
                answer = {"return": {}} if error is None else {"error": {"class": error, "desc": "no 'x'"}}
                stream.write(json.dumps({**answer, "id": request["id"]}).encode() + b"\r\n")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "q"))
        listener.listen()
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        with Client(tmp_path / "q", timeout=PATIENCE) as client, pytest.raises(QmpError, match="no 'x'"):
            obtain(client, WANTED)
        server.join(PATIENCE)
    assert asked == ["qmp_capabilities", "qom-list-get", "object-add", "memdev-get-fd", "object-del"]

"""What /readyz says, and when."""

from __future__ import annotations

import resource
import time

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.commands.conftest import Machine
from tests.patience import wait_for
from tests.web.site import Site


async def test_not_before_it_serves() -> None:
    """While objects are restored or created, the daemon is not ready."""
    from gmemd.web.state import State

    machine = Machine()
    state = State(machine.dispatcher, lambda: 0)
    assert state.why_not_ready() == "starting: objects are being restored or created"
    state.serving = True
    assert state.why_not_ready() == ""
    machine.gmemd.stopping = True
    assert state.why_not_ready() == "stopping"
    state.close()
    machine.gmemd.close()


def test_a_registry_that_cannot_be_written() -> None:
    """503 with the reason while objects cannot be recorded, in the metrics too; 200 when they can again."""
    with Site("--keeper", persist="on") as site, site.client() as client:
        pid = site.daemon()
        assert site.get("/readyz").status == 200
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
        with pytest.raises(QmpError, match="cannot be written"):
            _add_many(client, 100)
        refused = site.get("/readyz")
        assert refused.status == 503
        assert "cannot be written" in refused.text
        assert "gmemd_ready 0.0" in site.get("/metrics").text
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "again", "size": 4096})
        assert site.get("/readyz").status == 200


def test_what_came_back_is_counted() -> None:
    """After a crash of the daemon the next one has the objects, says so, and serves HTTP at the same place."""
    with Site("--keeper", persist="on") as site:
        with site.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 4096})
        site.kill()
        wait_for(lambda: _serves(site))
        text = site.get("/metrics").text
        assert "gmemd_restored_objects_total 1.0" in text
        assert "gmemd_fdstore_entries 1.0" in text
        assert [found["id"] for found in site.get("/api/v1/objects").json["objects"]] == ["ram0"]


def test_the_end_does_not_wait_for_viewers() -> None:
    """A daemon that is told to stop hangs up on open streams and slow clients."""
    with Site() as site, site.connect_http() as stream, site.connect_http() as half:
        stream.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(12) == b"HTTP/1.1 200"
        half.sendall(b"GET /")
        began = time.monotonic()
        assert site.stop() == 0
        assert time.monotonic() - began < 50  # aiohttp by itself would give them 60 s
        while stream.recv(65536):
            pass


def test_no_more_viewers_than_there_is_room_for() -> None:
    """The 17th stream is refused with 503; the page itself is served."""
    with Site() as site:
        viewers = [site.connect_http() for _ in range(16)]
        for viewer in viewers:
            viewer.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert viewer.recv(12) == b"HTTP/1.1 200"
        assert site.get("/live").status == 503
        assert site.get("/").status == 200
        for viewer in viewers:
            viewer.close()


def _add_many(client: Client, number: int) -> None:
    for found in range(number):
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": f"o{found}", "size": 4096})


def _serves(site: Site) -> bool:
    try:
        return site.get("/readyz").status == 200
    except OSError:
        return False



"""What HTTP answers, and what it does not answer."""

from __future__ import annotations

import json
import os
import signal
import socket
import time

import pytest

from gmemd.client.running import state
from tests.daemon import Daemon
from tests.lingering import Lingering
from tests.patience import PATIENCE, wait_for
from tests.web.site import Site

ROUTES = ("/", "/healthz", "/readyz", "/metrics", "/metrics?objects=1", "/openapi.json", "/api/v1/version",
          "/api/v1/capabilities", "/api/v1/objects", "/api/v1/objects/ram0", "/api/v1/objects/cvm0/ranges",
          "/api/v1/objects/ram0/holders", "/api/v1/holders", "/api/v1/events", "/api/v1/jobs")


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_answers(site: Site, path: str) -> None:
    """GET is answered, HEAD with the same status and no body, and nothing may be kept or guessed by a browser."""
    got, head = site.get(path), site.get(path, method="HEAD")
    assert (got.status, head.status, head.body) == (200, 200, b"")
    assert got.body
    assert (got.headers["cache-control"], got.headers["x-content-type-options"]) == ("no-store", "nosniff")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_but_reading(site: Site, method: str) -> None:
    """Other methods are refused, and the refusal names those that are not."""
    reply = site.get("/api/v1/objects", method=method)
    assert (reply.status, reply.headers["allow"]) == (405, "GET,HEAD")


def test_an_object_is_shown_as_query_memdev_status_shows_it(site: Site) -> None:
    """The members of MemdevStatus are the command's."""
    with site.client() as client:
        [status] = client.execute("query-memdev-status", {"id": "cvm0"})
    shown = site.get("/api/v1/objects/cvm0").json
    assert {**status, "age": 0} == {**{name: shown[name] for name in status}, "age": 0}
    assert (shown["private"], shown["ranges"]) == (16 << 12, 3)


def test_objects_come_in_portions(site: Site) -> None:
    """offset and limit cut the list; the total is always told."""
    first, second = site.get("/api/v1/objects?limit=1").json, site.get("/api/v1/objects?limit=1&offset=1").json
    assert [first["total"], second["total"]] == [2, 2]
    assert [portion["objects"][0]["id"] for portion in (first, second)] == ["ram0", "cvm0"]
    assert site.get("/api/v1/objects?offset=9").json["objects"] == []


def test_objects_are_searched_and_sorted(site: Site) -> None:
    """q looks into the id; sort=size puts the largest first."""
    assert [found["id"] for found in site.get("/api/v1/objects?q=vm").json["objects"]] == ["cvm0"]
    assert [found["id"] for found in site.get("/api/v1/objects?sort=size").json["objects"]] == ["ram0", "cvm0"]
    assert [found["id"] for found in site.get("/api/v1/objects?sort=id").json["objects"]] == ["cvm0", "ram0"]


def test_ranges_are_those_of_the_command(site: Site) -> None:
    """All ranges, or a portion of them with the offset of the next."""
    with site.client() as client:
        answer = client.execute("query-memdev-ranges", {"id": "cvm0"})
    assert answer == site.get("/api/v1/objects/cvm0/ranges").json
    portion = site.get("/api/v1/objects/cvm0/ranges?limit=2").json
    assert answer["ranges"][:2] == portion["ranges"]
    rest = site.get(f"/api/v1/objects/cvm0/ranges?offset={portion['next-offset']}").json
    assert (answer["ranges"][2:], False) == (rest["ranges"], "next-offset" in rest)


def test_what_is_not_there_is_not_found(site: Site) -> None:
    """404 with QEMU's sentence; also for the ranges of what is not a guest_memfd."""
    reply = site.get("/api/v1/objects/nobody")
    assert reply.status == 404
    assert reply.json["error"] == {"class": "DeviceNotFound", "desc": "object 'nobody' not found"}
    assert site.get("/api/v1/objects/ram0/ranges").status == 404
    assert site.get("/api/v1/secrets").status == 404
    assert site.get("/api/v1/objects/ram0").status == 200


@pytest.mark.parametrize(("query", "desc"), [
    ("limit=0", "Parameter 'limit' expects an integer from 1 to 100"),
    ("limit=101", "Parameter 'limit' expects an integer from 1 to 100"),
    ("limit=1e2", "Parameter 'limit' expects an integer from 1 to 100"),
    ("limit=%D9%A1", "Parameter 'limit' expects an integer from 1 to 100"),  # a digit, but not an ASCII one
    ("limit=1&limit=2", "Parameter 'limit' is given twice"),
    ("sort=age", "Parameter 'sort' expects one of created, id, size"),
    ("q=" + "x" * 101, "Parameter 'q' expects at most 100 characters"),
    ("verbose=1", "Parameter 'verbose' is unexpected"),
])
def test_wrong_parameters_are_refused(site: Site, query: str, desc: str) -> None:
    """400, with a sentence that names the parameter."""
    reply = site.get(f"/api/v1/objects?{query}")
    assert (400, desc) == (reply.status, reply.json["error"]["desc"])


def test_too_long_a_query_is_refused(site: Site) -> None:
    """A query string has at most 1024 bytes, a request line what the library takes."""
    assert site.get("/api/v1/objects?q=" + "x" * 1100).status == 414
    assert site.get("/api/v1/objects?q=" + "x" * 20_000).status == 400
    assert site.get("/api/v1/objects?q=" + "x" * 100).status == 200


def test_a_jumbled_request_is_refused(site: Site) -> None:
    """What is not HTTP gets 400, and the next client is served."""
    with site.connect_http() as sock:
        sock.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
        assert b" 400 " in sock.recv(4096)
    assert site.get("/healthz").status == 200


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "localhost:80", "127.0.0.1:65535"])
def test_this_host_may_ask(tcp_site: Site, host: str) -> None:
    """The Host header names the loopback interface; the port may be a tunnel's."""
    assert tcp_site.get("/api/v1/objects", headers={"Host": host}).status == 200


@pytest.mark.parametrize("host", [
    "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost@evil.example", "evil.example:80", "[::2]",
    "0.0.0.0", "", "localhost/x", "[::1"])
def test_other_names_may_not_ask(tcp_site: Site, host: str) -> None:
    """A name that leads here by DNS is some other site's."""
    for path in ("/api/v1/objects", "/", "/metrics", "/live"):
        assert tcp_site.get(path, headers={"Host": host}).status == 403


@pytest.mark.parametrize("headers", [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "https://localhost"},
    {"Origin": "http://localhost:1"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
])
def test_other_sites_pages_may_not_ask(tcp_site: Site, headers: dict[str, str]) -> None:
    """What a browser says of the page that asks is believed."""
    assert tcp_site.get("/api/v1/objects", headers=headers).status == 403


def test_its_own_page_and_links_to_it_are_served(tcp_site: Site) -> None:
    """The page's own requests, and somebody following a link."""
    host = f"127.0.0.1:{tcp_site.port}"
    own = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert tcp_site.get("/api/v1/objects", headers=own).status == 200
    assert tcp_site.get("/", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}).status == 200


def test_a_unix_socket_may_be_forwarded(site: Site) -> None:
    """What holds for TCP holds there, too."""
    assert site.get("/api/v1/objects", headers={"Host": "evil.example"}).status == 403
    assert site.get("/api/v1/objects", headers={"Host": "127.0.0.1:9464"}).status == 200


def test_without_or_with_two_hosts(tcp_site: Site) -> None:
    """Exactly one Host header is required."""
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        with tcp_site.connect_http() as sock:
            sock.sendall(b"GET /healthz HTTP/1.1\r\n" + hosts + b"\r\n")
            assert b" 400 " in sock.recv(4096)


def test_only_this_host_can_connect(tcp_site: Site) -> None:
    """Nothing listens but the loopback interface."""
    with open(f"/proc/{tcp_site.pid}/net/tcp") as table:
        ours = [line.split()[1] for line in table if f":{tcp_site.port:04X} " in line.split("rem")[0][:20]]
    assert {f"0100007F:{tcp_site.port:04X}"} == set(ours)


def test_more_connections_than_there_is_room_for(site: Site) -> None:
    """Where all only wait, for a request or the rest of one, one makes room; QMP does not notice."""
    connections = [site.connect_http() for _ in range(64)]
    try:
        for number, sock in enumerate(connections):
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: loc"[:number])
        assert _once_there_is_room(site) == 200
        assert sum(_is_open(sock) for sock in connections) == 63
        with site.client() as client:
            client.execute("query-version")
    finally:
        for sock in connections:
            sock.close()


def _is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True


def _once_there_is_room(site: Site) -> int:
    while True:
        try:
            return site.get("/healthz").status
        except (ConnectionError, OSError):
            continue


def test_nobody_waits_for_what_is_passed_to_http(site: Site, lingering: Lingering) -> None:
    """A descriptor that comes with a request, read or not, is closed without anybody waiting for it."""
    with site.connect_http() as sock, site.connect_http() as other:
        os.kill(site.pid, signal.SIGSTOP)  # so that its descriptors are the last ones
        wait_for(lambda: state(site.pid) == "T")
        socket.send_fds(sock, [b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"], [lingering.give()])
        socket.send_fds(other, [b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"], [lingering.give()])
        other.sendall(b"x" * 100_000)
        lingering.given()
        os.kill(site.pid, signal.SIGCONT)
        assert sock.recv(12) == b"HTTP/1.1 200"
    assert site.get("/healthz").status == 200


def test_a_slow_client_hinders_nobody(site: Site) -> None:
    """One that sends half a request, and one that does not read, leave the others alone."""
    with site.connect_http() as half, site.connect_http() as deaf:
        half.sendall(b"GET /healthz HT")
        for _ in range(50):
            deaf.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert site.get("/healthz").status == 200
        with site.client() as client:
            client.execute("query-version")


def test_no_http_no_libraries() -> None:
    """With HTTP off, which is the default, neither aiohttp nor prometheus_client is loaded."""
    with Daemon() as daemon:
        loaded = _mapped(daemon.pid)
    assert [name for name in loaded if "aiohttp" in name or "prometheus" in name or "multidict" in name] == []


def test_with_http_the_libraries_are_seen(site: Site) -> None:
    """The look of the test before would see them."""
    assert any("aiohttp" in name for name in _mapped(site.pid))


def _mapped(pid: int) -> set[str]:
    with open(f"/proc/{pid}/maps") as maps:
        return {line.split(None, 5)[5].strip() for line in maps if len(line.split(None, 5)) == 6}


def test_the_socket_is_for_owner_and_group_and_goes_with_the_daemon() -> None:
    """Mode 0660 as QMP's; a second daemon replaces a stale one."""
    with Site() as site:
        path = site.dir / "http.sock"
        assert os.stat(path).st_mode == 0o140660
        site.stop()
        assert not path.exists()


@pytest.mark.parametrize(("option", "desc"), [
    ("tcp:0.0.0.0:80", "'0.0.0.0' is not the loopback interface: HTTP serves this host only"),
    ("tcp:example.com:80", "'example.com' is not the loopback interface: HTTP serves this host only"),
    ("tcp:127.0.0.1:x", "'x' is not a TCP port"),
    ("tcp:127.0.0.1:65536", "'65536' is not a TCP port"),
    ("unix:", "--http takes off, unix:PATH or tcp:127.0.0.1:PORT, not 'unix:'"),
    ("8080", "--http takes off, unix:PATH or tcp:127.0.0.1:PORT, not '8080'"),
])
def test_addresses_that_are_none(option: str, desc: str) -> None:
    """Only this host's own addresses are served."""
    from gmemd.errors import QmpError
    from gmemd.web.address import parse_http

    with pytest.raises(QmpError) as caught:
        parse_http(option)
    assert desc == caught.value.desc


def test_addresses() -> None:
    """A path, and both loopback interfaces."""
    from gmemd.web.address import Address, parse_http

    assert Address(path="/run/x") == parse_http("unix:/run/x")
    assert Address(host="127.0.0.1", port=80) == parse_http("tcp:localhost:80")
    assert Address(host="::1", port=0) == parse_http("tcp:[::1]:0")


def test_a_port_in_use() -> None:
    """The daemon says so and does not start."""
    with (socket.create_server(("127.0.0.1", 0)) as taken,
          pytest.raises(ConnectionError, match="Address already in use") as caught):
        Daemon("--http", f"tcp:127.0.0.1:{taken.getsockname()[1]}")
    assert "Traceback" not in str(caught.value)


def test_events_are_kept_for_those_who_come_later(site: Site) -> None:
    """The latest first, with time and data as the client got them."""
    event = site.get("/api/v1/events?limit=1").json[0]
    assert event["event"] == "MEMDEV_CONVERTED"
    assert event["data"] == {"id": "cvm0", "offset": 16 << 12, "size": 16 << 12, "to": "private"}


def test_holders_are_those_of_the_command(site: Site) -> None:
    """This process holds ram0 while it has the descriptor, and is soon shown."""
    with site.client() as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram0"})
        try:
            answer = client.execute("query-memdev-holders", {"id": "ram0"})
            end = time.monotonic() + PATIENCE  # a look at all processes is good for some seconds
            while not (shown := site.get("/api/v1/objects/ram0/holders").json):
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            os.close(fd)
    assert [os.getpid()] == [holder["pid"] for holder in answer]
    assert answer == shown


def test_the_stream_tells_of_a_new_object() -> None:
    """The first message has everything, the next what has changed."""
    with Site() as site, site.client() as client, site.connect_http() as sock:
        sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stream = sock.makefile("rb")
        first = _next_message(stream)
        assert (first["rows"], first["order"]) == ({}, [])
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "new", "size": 4096})
        message = _next_message(stream)
        while "new" not in message["rows"]:
            message = _next_message(stream)
        assert message["order"] == ["new"]


def _next_message(stream: object) -> dict[str, object]:
    for line in stream:  # type: ignore[attr-defined]
        if line.startswith(b"data: "):
            found: dict[str, object] = json.loads(line[6:])
            return found
    raise AssertionError("the stream has ended")


def test_snapshots_are_listed_counted_and_shown(site: Site) -> None:
    """In pages, with the figures in the metrics and on the page; a damaged one is a warning there."""
    client = site.client()
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "saved", "size": 4096})
    for name in ("one", "two"):
        client.execute("memdev-snapshot", {"id": "saved", "name": name})
    found = site.get("/api/v1/snapshots?limit=1").json
    assert (found["total"], [entry["name"] for entry in found["snapshots"]]) == (2, ["one"])
    assert 'gmemd_snapshots{state="usable"} 2.0' in site.get("/metrics").text
    assert "<dt>Snapshots</dt><dd>2<small>" in site.get("/").text
    (site.dir / "snapshots" / "one" / "manifest.json").write_text("{}")
    assert len(client.execute("query-memdev-snapshots")) == 2
    assert "1 snapshot cannot be used: snapshot &#x27;one&#x27; is damaged" in site.get("/").text
    for name in ("one", "two"):
        client.execute("memdev-snapshot-delete", {"name": name})
    client.execute("object-del", {"id": "saved"})
    client.close()


async def test_the_page_with_more_jobs_than_it_shows() -> None:
    """The newest of them, however many there are."""
    from gmemd.web.page import render_page
    from gmemd.web.picture import JOBS, Painter
    from gmemd.web.state import State
    from tests.commands.conftest import Machine

    machine = Machine()
    state = State(machine.dispatcher, lambda: 0)
    for number in range(3 * JOBS):
        machine.gmemd.jobs.create(f"job{number}", "memdev-digest", 1)
    page = await render_page(state, Painter(state), {"q": "", "sort": "created", "page": 1})
    assert page.count("<progress ") == JOBS
    assert f"job{3 * JOBS - 1}<" in page
    state.close()
    machine.gmemd.close()

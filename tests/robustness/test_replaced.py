"""The installed package is replaced, or away, under a running daemon: it serves to its end what it served at its start.

What is replaced here is a directory of links to all packages; afterwards there are packages of those names that fail
when anybody imports them. A hook in the daemon reports every import and every file of a package that is opened.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gmemd.cli.introspection import Introspection, Member
from gmemd.client.client import Client
from gmemd.client.running import children
from gmemd.errors import QmpError
from tests.patience import PATIENCE
from tests.programs import ROOT

SIZE = 2 << 20

PROGRAM = """
import os, sys
sys.path.insert(0, {packages!r})

def told(event, details):
    loads = event == "import" or event == "open" and isinstance(details[0], str) and details[0].startswith(places)
    if loads and os.path.exists({go!r}):
        os.write(seen, f"{{event}} {{details[0]}}\\n".encode())

places = ({packages!r}, sys.base_prefix + "/lib")
seen = os.open({seen!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
sys.addaudithook(told)
from {module} import main
sys.exit(main())
"""

SERVERS = {
    "gmemd": ("gmemd.cli.gmemd", ["--persist", "off", "--qmp", "unix:{dir}/q", "--kernel", "simulated", "--lab",
                                  "--http", "unix:{dir}/h", "--audit", "{dir}/audit"]),
    "cold": ("gmemd.cli.gmemd", ["--persist", "off", "--qmp", "unix:{dir}/q", "--kernel", "simulated",
                                 "--warm", "off"]),
    "keeper": ("gmemd.cli.gmemd", ["--keeper", "--qmp", "unix:{dir}/q", "--kernel", "simulated"]),
    "emulator": ("gmemd.emulator.main", ["-machine", "pc", "-m", "128M,slots=4,maxmem=1G",
                                         "-qmp", "unix:{dir}/q,server=on,wait=off"]),
}


class Running(NamedTuple):
    """A server, and where its things are."""

    process: subprocess.Popen[bytes]
    directory: Path
    name: str

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def replace_packages(self) -> None:
        """Replace the installed packages with ones that cannot be imported."""
        packages = self.directory / "packages"
        names = [entry.name for entry in packages.iterdir()]
        packages.rename(self.directory / "old")
        for name in names:
            (packages / name.partition(".")[0]).mkdir(parents=True, exist_ok=True)
            (packages / name.partition(".")[0] / "__init__.py").write_text("raise ImportError('another version')\n")

    def loads_and_opens(self) -> str:
        return (self.directory / "seen").read_text()


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in [Path(entry) for entry in sys.path if entry.endswith("-packages")]:
        for entry in folder.iterdir():
            if not entry.name.startswith(("gmemd", "__")) and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    (packages / "gmemd").symlink_to(ROOT / "gmemd")
    module, arguments = SERVERS[request.param]
    program = PROGRAM.format(packages=str(packages), module=module, go=f"{tmp_path}/go", seen=f"{tmp_path}/seen")
    interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([interpreter, "-S", "-P", "-c", program,
                                    *(word.replace("{dir}", str(tmp_path)) for word in arguments)],
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    yield Running(process, tmp_path, request.param)
    if process.poll() is None:
        process.terminate()
        process.wait(PATIENCE)


def wait_loaded(server: Running) -> None:
    """Wait until all that is loaded behind the start is there: its libraries, and no thread is left."""
    pid = server.process.pid
    [daemon] = children(pid) or [pid]
    end = time.monotonic() + PATIENCE
    while "/_hashlib" not in Path(f"/proc/{daemon}/maps").read_text() or len(os.listdir(f"/proc/{daemon}/task")) > 1:
        assert time.monotonic() < end, server.log()
        time.sleep(0.01)


def test_replaced_at_once(server: Running) -> None:
    """Replaced before the first refusal, just when it has greeted: everything works, and says what it should."""
    with Client(server.directory / "q", wait=PATIENCE, timeout=PATIENCE, oob=True) as client:
        server.replace_packages()
        use_all(client, server)
    check_end(server)


def test_nothing_is_loaded_at_a_first_use(server: Running) -> None:
    """Once all is loaded, no command and no request imports anything, or opens a file of a package, which is gone."""
    with Client(server.directory / "q", wait=PATIENCE, timeout=PATIENCE, oob=True) as client:
        if server.name == "cold":
            assert "/_hashlib" not in Path(f"/proc/{server.process.pid}/maps").read_text()
            client.execute("query-jobs")
        wait_loaded(server)
        server.replace_packages()
        shutil.rmtree(server.directory / "old")
        (server.directory / "go").touch()
        use_all(client, server)
    assert server.loads_and_opens() == ""
    check_end(server)
    assert server.loads_and_opens() == ""


def check_end(server: Running) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    assert "Traceback" not in server.log()
    assert "internal error" not in server.log()


def use_all(client: Client, server: Running) -> None:
    """Every command, rightly and wrongly, and every page."""
    known = Introspection(client.execute("query-qmp-schema"))
    for name in ("r", "m"):
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": SIZE})
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "g", "size": SIZE, "share": True,
                                  "guest-memfd": "on"})
    client.execute("object-add", {"qom-type": "memory-backend-file", "id": "f", "size": SIZE,
                                  "mem-path": str(server.directory)})
    served = [name for name in known.names("command") if name not in ("quit", "qmp_capabilities", "object-del")]
    said = [outcome(client, name, arguments) for name in [*served, "object-del"]
            for arguments in (*wrong(known, name), right(known, name))]
    assert [text for text in said if "internal" in text] == [], server.log()[:3000]
    assert sum(text == "done" for text in said) >= len(served) // 3
    jobs = {"populate": {"id": "m"}, "verify": {"id": "m"}, "delete": {"id": "m", "zero": True}}
    for job, arguments in jobs.items():
        client.execute(f"memdev-{job}", {**arguments, "job-id": f"job-{job}"})
        while (state := found(client, f"job-{job}"))["status"] != "concluded":
            time.sleep(0.005)
        assert "error" not in state, state
    if (server.directory / "h").exists():
        visit_all(str(server.directory / "h"))


def found(client: Client, job: str) -> dict[str, Any]:
    [state] = [state for state in client.execute("query-jobs") if state["id"] == job]
    return dict(state)


def outcome(client: Client, name: str, arguments: dict[str, Any]) -> str:
    try:
        client.execute(name, arguments)
    except QmpError as error:
        return f"{name} {arguments}: {error.desc}"
    return "done"


def right(known: Introspection, name: str) -> dict[str, Any]:
    """Arguments of the right types: what is needed, the id of an object or a word of its kind."""
    return {member.name: fitting(known, member) for member in known.members(name) if not member.optional}


def wrong(known: Introspection, name: str) -> Iterator[dict[str, Any]]:
    """What is not to be there, and each member with a value that it cannot have."""
    yield {"nonsense": 1}
    for member in known.members(name):
        yield {**right(known, name), member.name: None}


def fitting(known: Introspection, member: Member) -> Any:
    words = {"id": "r", "path": "/objects/r", "qom-type": "memory-backend-memfd", "property": "size",
             "typename": "memory-backend-memfd", "command": "query-version"}
    if member.name in words:
        return words[member.name]
    kind = known.entry(member.type)
    values = known.values(member.type)
    if values:
        return values[0]
    by_type = {"string": "x", "int": 0, "boolean": False, "number": 0, "value": 0}
    return {"array": [], "object": {}}.get(kind["meta-type"], by_type.get(kind.get("json-type", ""), "x"))


def visit_all(path: str) -> None:
    """Every page of the description, and one that is not there, with and without a wrong parameter."""
    def get(page: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(path)
        connection.request("GET", page)
        answer = connection.getresponse()
        body = b"" if answer.getheader("Content-Type") == "text/event-stream" else answer.read()
        connection.sock.close()
        return answer.status, body

    _, description = get("/openapi.json")
    for page in [*json.loads(description)["paths"], "/nothing"]:
        for parameters in ("", "?nonsense=1"):
            status, body = get(page.replace("{id}", "r") + parameters)
            assert status in (200, 400, 404, 503), page
            assert b"internal" not in body, page

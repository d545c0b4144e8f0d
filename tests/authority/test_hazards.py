"""Who a client is taken for, with real users, groups and namespaces.

The daemon's policy: root is admin, users 1000 and 1001 are tenants, group 3000 observes, everybody else is refused.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.processes.identity import system_unit
from tests.daemon import Daemon
from tests.patience import PATIENCE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root can be anybody")

POLICY = """\
version = 1
[[rule]]
name = "root"
match = { uid = 0 }
role = "admin"
[[rule]]
name = "tenants"
match = { uid = [1000, 1001] }
role = "tenant"
[[rule]]
name = "group"
match = { group = 3000 }
role = "observer"
"""
# What a client does after `become`: it connects, says what it may, or why it may not come in.
CLIENT = """
import json, os, socket, sys, time
def connect():
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    return sock
def greeted():
    sock = connect()
    sock.recv(1, socket.MSG_PEEK)
    return sock
def ask(sock):
    lines = sock.makefile("rwb")
    first = json.loads(lines.readline())
    if "error" in first:
        return first["error"]["desc"]
    for command in ("qmp_capabilities", "query-memdev-rights"):
        lines.write(json.dumps({"execute": command}).encode())
        lines.flush()
        answer = json.loads(lines.readline())
    return f"{answer['return']['role']} {answer['return']['uid']}"
def become(real, effective, groups=()):
    os.setgroups(groups)
    os.setresgid(real or 1, effective or 1, effective or 1)
    os.setresuid(real, effective, effective)
"""
REFUSED = "this client is not let in"


class Site:
    """A daemon that everybody can reach, and clients."""

    def __init__(self, folder: Path, *before: str) -> None:
        folder.chmod(0o755)
        self.policy = folder / "policy.toml"
        self.policy.write_text(POLICY)
        self.policy.chmod(0o644)
        self.daemon = Daemon("--policy", str(self.policy), "--audit", str(folder / "audit"), kernel="simulated",
                             prefix=before)
        self.audit = folder / "audit"

    def __enter__(self) -> Site:
        self.daemon.__enter__()
        self.daemon.dir.chmod(0o755)
        self.daemon.sock.chmod(0o666)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.daemon.__exit__(*exc)

    def says(self, code: str, *before: str) -> str:
        """What a client prints; `before` is what starts it."""
        done = subprocess.run([*before, sys.executable, "-c", CLIENT + code, str(self.daemon.sock)], timeout=PATIENCE,
                              capture_output=True, text=True, env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""},
                              check=False)
        return done.stdout.strip() or done.stderr

    def refusals(self) -> list[str]:
        """Why clients were refused, by the audit."""
        lines = map(json.loads, self.audit.read_text().splitlines())
        return [line["desc"] for line in lines if line["result"] == "refused"]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="gmemd-hazards-"))
    with Site(folder) as site:
        yield site
    shutil.rmtree(folder)


@pytest.mark.parametrize(("code", "said"), [
    ("print(ask(connect()))", "admin 0"),
    ("become(1000, 1000); print(ask(connect()))", "tenant 1000"),
    ("become(1002, 1002); print(ask(connect()))", REFUSED),
    ("become(1002, 1002, [5, 3000]); print(ask(connect()))", "observer 1002"),
    # What the kernel remembers is who connected, whatever becomes of it once it is let in.
    ("sock = greeted(); become(1000, 1000); print(ask(sock))", "admin 0"),
    ("sock = greeted(); become(1002, 1002); print(ask(sock))", "admin 0"),
    ("become(1000, 1000); sock = connect(); os.fork() or os._exit(print(ask(sock), flush=True)); os.wait()",
     "tenant 1000"),
    # Effectively root for somebody who is not: neither admin, nor anybody else.
    ("become(1000, 0); print(ask(connect()))", REFUSED),
    ("become(0, 1000); print(ask(connect()))", "tenant 1000"),
    # More groups than can be looked at.
    ("become(1000, 1000, range(5000, 5300)); print(ask(connect()))", REFUSED),
])
def test_a_client_is_who_connected(site: Site, code: str, said: str) -> None:
    assert site.says(code) == said


def test_the_connector_has_ended(site: Site) -> None:
    """A connection whose maker has ended before it was accepted belongs to nobody; the daemon waits meanwhile."""
    code = """
import signal
os.kill({0}, signal.SIGSTOP)
reader, writer = socket.socketpair()
if not os.fork():
    sock = connect()
    socket.send_fds(writer, [b"x"], [sock.fileno()])
    os._exit(0)
_, (fd,), _, _ = socket.recv_fds(reader, 1, 1)
os.wait()
os.kill({0}, signal.SIGCONT)
print(ask(socket.socket(fileno=fd)))
"""
    try:
        assert site.says(code.format(site.daemon.pid)) == REFUSED
    finally:
        os.kill(site.daemon.pid, signal.SIGCONT)
    assert site.refusals()[-1] == "the process that connected has ended"


@pytest.mark.parametrize("others", ["", "| os.CLONE_NEWPID | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWIPC"])
def test_root_of_a_user_namespace_is_nobody_special(site: Site, others: str) -> None:
    """As in a rootless container: inside it is root, for the daemon the user who made it."""
    code = f"""
import ctypes
become(1000, 1000)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which changing the user took away: to write the map
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 {others.replace('os.', '')}):
    sys.exit("no namespaces here: " + os.strerror(ctypes.get_errno()))
open("/proc/self/uid_map", "w").write("0 1000 1")
if os.fork():
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
assert os.getuid() == 0
print(ask(connect()), flush=True)
os._exit(0)
""".replace("CLONE_NEWPID", "0x20000000").replace("CLONE_NEWNS", "0x20000").replace(
        "CLONE_NEWNET", "0x40000000").replace("CLONE_NEWIPC", "0x8000000")
    said = site.says(code)
    if "no namespaces here" in said:
        pytest.skip(said)
    assert said == "tenant 1000"


def test_a_user_without_a_number_is_refused(tmp_path: Path) -> None:
    """In a user namespace the daemon sees all who are not mapped as one user, 65534, whatever the policy says of it."""
    folder = Path(tempfile.mkdtemp(prefix="gmemd-hazards-"))
    try:
        with Site(folder, "unshare", "--user", "--map-root-user", "--keep-caps") as site:
            site.policy.write_text(POLICY.replace("1001]", "65534]"))
            os.kill(site.daemon.pid, signal.SIGHUP)
            assert site.says("become(1000, 1000); print(ask(connect()))") == REFUSED
            assert "another user namespace" in site.refusals()[-1]
            assert site.says("print(ask(connect()))") == "admin 0"
    finally:
        shutil.rmtree(folder)


def test_a_new_policy_is_for_those_who_are_there(site: Site) -> None:
    """A tenant that becomes an operator would be in another room, and has to connect again; an operator that becomes
    an observer stays; a wrong policy changes nothing; who has no rights any more is hung up on."""
    code = """
def begin():
    global lines
    lines = connect().makefile("rwb")
    lines.readline()
    do("qmp_capabilities")
def do(command):
    try:
        lines.write(json.dumps({"execute": command}).encode())
        lines.flush()
        answer = lines.readline()
    except ConnectionError:
        answer = b""
    return json.loads(answer).get("return", {}) if answer else {"role": "gone"}
become(1001, 1001)
begin()
for line in sys.stdin:
    while do("query-memdev-rights").get("role") != line.strip():
        time.sleep(0.001)
    print("now", line.strip(), flush=True)
    if line == "gone\\n":
        begin()
"""
    client = subprocess.Popen([sys.executable, "-c", CLIENT + code, str(site.daemon.sock)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdin is not None
    assert client.stdout is not None
    operator = POLICY.replace("[1000, 1001]", "1000") + (
        '[[rule]]\nname = "operators"\nmatch = { uid = 1001 }\nrole = "operator"\n')
    try:
        for text, role in ((POLICY, "tenant"), (operator, "gone"), (operator, "operator"), ("versio = 1\n", "operator"),
                           (operator.replace('"operator"', '"observer"'), "observer"),
                           (operator.replace('"operator"', '"none"'), "gone")):
            site.policy.write_text(text)
            os.kill(site.daemon.pid, signal.SIGHUP)
            client.stdin.write(f"{role}\n")
            client.stdin.flush()
            assert client.stdout.readline() == f"now {role}\n"
    finally:
        client.kill()
        client.communicate()
        site.policy.write_text(POLICY)
        os.kill(site.daemon.pid, signal.SIGHUP)


def test_the_audit_says_by_which_right(site: Site) -> None:
    site.says('become(1000, 1000); s = connect(); ask(s)\n'
              'for m in ("getfd", "quit"): s.sendall(json.dumps({"execute": m}).encode()); s.recv(999)')
    lines = [json.loads(line) for line in site.audit.read_text().splitlines()]
    told = [(line["command"], line["role"], line["rule"], line["result"]) for line in lines if line.get("uid") == 1000
            and line["result"] != "refused"]
    assert told[-2:] == [("getfd", "tenant", "tenants", "GenericError"),
                         ("quit", "tenant", "tenants", "CommandNotFound")]


@pytest.mark.parametrize(("cgroup", "unit"), [
    ("/system.slice/virtqemud.service", "virtqemud.service"),
    ("/system.slice/system-qemu.slice/qemu@1.service/payload", "qemu@1.service"),
    ("/user.slice/user-1000.slice/user@1000.service/app.slice/virtqemud.service", "user@1000.service"),
    ("/user.slice/user-1000.slice/session-1.scope", "session-1.scope"),
    ("/machine.slice", None), ("/", None)])
def test_a_unit_is_the_systems(cgroup: str, unit: str | None) -> None:
    """A user can call a unit or a group below its own manager like any unit of the system."""
    assert system_unit(cgroup) == unit

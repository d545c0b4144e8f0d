"""HTTP has a caller: the peer of a unix socket, or what the policy says of TCP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.web.site import Site

RULE = '[[rule]]\nname = "{0}"\nmatch = {{ {1} }}\nrole = "{2}"\n'
ROOT = RULE.format("me", f"uid = {os.geteuid()}", "admin")


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "policy.toml"
        path.write_text("version = 1\n" + text)
        path.chmod(0o600)
        return str(path)

    return write


@pytest.mark.parametrize(("rules", "status"), [
    ("", 403), (RULE.format("web", "http = true", "observer"), 200), (RULE.format("web", "http = true", "none"), 403)])
def test_by_tcp_there_is_what_the_policy_says(policy: Callable[[str], str], rules: str, status: int) -> None:
    with Site("--policy", policy(ROOT + rules), tcp=True) as site:
        assert site.get("/api/v1/objects").status == status
        assert site.get("/metrics").status == status
        assert site.get("/healthz").status == 200


def test_a_rule_may_deny_a_part(policy: Callable[[str], str]) -> None:
    rule = RULE.format("web", "http = true", "observer") + 'deny = ["query-memdev-holders"]\n'
    with Site("--policy", policy(ROOT + rule), tcp=True) as site:
        assert site.get("/api/v1/objects").status == 200
        reply = site.get("/api/v1/holders")
    assert (reply.status, reply.json["error"]["desc"]) == (403, "Command query-memdev-holders disabled by policy")


@pytest.mark.skipif(os.geteuid() != 0, reason="root can be anybody")
def test_on_a_unix_socket_it_is_who_connected(policy: Callable[[str], str]) -> None:
    """One who sees all is served, a tenant and a stranger are not."""
    rules = RULE.format("tenant", "uid = 1000", "tenant") + RULE.format("observer", "uid = 1001", "observer")
    with Site("--policy", policy(ROOT + rules)) as site:
        site.dir.chmod(0o755)
        (site.dir / "http.sock").chmod(0o666)
        answers = [subprocess.run([sys.executable, "-c", f"""
import os, socket
os.setgroups([])
os.setresgid({uid}, {uid}, {uid})
os.setresuid({uid}, {uid}, {uid})
sock = socket.socket(socket.AF_UNIX)
sock.connect({str(site.dir / "http.sock")!r})
sock.sendall(b"GET /api/v1/objects HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n")
print(sock.makefile("rb").read().split()[1].decode())
"""], capture_output=True, text=True, timeout=PATIENCE, check=True).stdout.strip() for uid in (1000, 1001, 1002)]
        assert site.get("/api/v1/objects").status == 200
    assert answers == ["403", "200", "403"]


def test_without_a_policy_it_is_as_before() -> None:
    with Site(tcp=True) as site:
        assert site.get("/api/v1/objects").status == 200

"""What README and the how-to pages tell people to type works, and what they link to exists."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, needs

pytestmark = pytest.mark.e2e
MIB = 1 << 20

# Blocks of these pages run, one after another, on a gmemd without objects (gmemctl.md: tests/cli).
PAGES = ("README.md", "docs/qemu.md", "docs/templates.md", "docs/audit.md", "docs/metrics.md", "docs/libvirt.md",
         "docs/quotas.md", "docs/rooms.md")
# What the other blocks need, and who runs them: a marked block must be on one of these pages.
MARKED = {
    "clone": {"README.md"},  # test_fresh_clone.py here and in tests/containers run script/run; script/test runs this
    "podman": {"README.md", "docs/containers.md"},  # tests/containers/test_docs.py
    "libvirt": {"docs/libvirt.md"},  # test_libvirt.py
    "cluster": {"docs/kubernetes.md"},  # tests/kubernetes/test_manifests.py renders what they apply
    "host": {"docs/systemd.md", "docs/policy.md"},  # tests/systemd, in other machines: they change this one
    "minutes": {"docs/robustness.md", "docs/kernel.md", "docs/building.md"},  # nobody: they take long, or other
                                       # kernels; of the first, tests/robustness runs samples, of the last script/test
    "qemu": {"docs/qemu.md", "docs/gmemctl.md"},  # below
    "two": {"docs/moving.md"},  # two hosts; test_moving.py runs the same on one
    "replace": {"docs/qemu.md"},  # test_qemu_boots.py
    "fork": {"docs/qemu.md"},  # tests/vmm/test_fork.py
    "checkpoint": {"docs/qemu.md"},  # test_checkpoint_refusals.py
    "capture": {"docs/qemu.md"},  # below
    "adopt": {"docs/qemu.md"},  # below
    "attach": {"docs/qemu.md"},  # tests/vmm/test_real_guests.py
}
ALL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```sh ?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Word behind "sh" and text of each block."""
    return [(found[1].strip(), found[2]) for found in _BLOCK.finditer(page.read_text())]


def user_environment(directory: Path, daemon: Daemon) -> dict[str, str]:
    """That of a user who has installed gmemd, and whose daemon this is; the programs are put into the directory."""
    programs = directory / "bin"
    programs.mkdir()
    for program, module in (("gmemctl", "cli.gmemctl"), ("gmemd", "cli.gmemd"), ("gmemd-emulator", "emulator.main")):
        file = programs / program
        file.write_text(f'#!/bin/sh\nexec {sys.executable} -m gmemd.{module} "$@"\n')
        file.chmod(0o755)
    return {**os.environ, "GMEMD_SOCKET": str(daemon.sock), "PYTHONPATH": str(ROOT),
            "PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name: str, tmp_path: Path) -> None:
    """Every line of the page's unmarked blocks succeeds."""
    text = "".join(text for word, text in blocks(ROOT / name) if not word).replace("/tmp/", f"{tmp_path}/")
    script = f"set -eu\ntrap 'kill $(jobs -p) 2>/dev/null && wait' EXIT\n{text}"
    with Daemon(kernel="simulated") as daemon:
        environment = user_environment(tmp_path, daemon)
        if name == "docs/libvirt.md":
            del environment["GMEMD_SOCKET"]  # the emulator would make its memory there
        done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True,
                              timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hint" not in done.stderr
    assert "Traceback" not in done.stderr


def test_blocks_that_do_not_run_say_what_they_need() -> None:
    """A block is left out only by a word that is listed here, on a page that is listed with it."""
    found: dict[str, set[str]] = {}
    for page in ALL:
        for word, _ in blocks(page):
            if word:
                found.setdefault(word, set()).add(str(page.relative_to(ROOT)))
    assert found == MARKED


def test_every_block_says_what_it_is() -> None:
    """A shell block without a word after its fence would not be run."""
    bare = [(page.name, text) for page in ALL for text in re.findall(r"^```\n(.*?)^```$", _unfenced(page), re.M | re.S)]
    assert [name for name, text in bare if re.search(r"^(gmemd|gmemctl|podman|virsh|curl|pip) ", text, re.M)] == []


def _unfenced(page: Path) -> str:
    """A page without the blocks that say what they are."""
    return re.sub(r"^```\w.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_page_with_blocks_is_run() -> None:
    unmarked = {str(page.relative_to(ROOT)) for page in ALL if any(not word for word, _ in blocks(page))}
    assert unmarked == {*PAGES, "docs/gmemctl.md"}


def test_the_fixture_page_runs(tmp_path: Path) -> None:
    """The tests on docs/testing.md pass as they stand there."""
    [text] = re.findall(r"^```python test_vmm.py\n(.*?)^```", (ROOT / "docs" / "testing.md").read_text(),
                        re.DOTALL | re.MULTILINE)
    (tmp_path / "test_vmm.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
                           str(tmp_path)], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_the_mapping_on_the_libvirt_page_is_the_objects(tmp_path: Path) -> None:
    """Its program maps the object that it names, also where another one lies before it in the same file."""
    [program] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/libvirt.md").read_text(), re.DOTALL | re.MULTILINE)
    file, sock = tmp_path / "two", tmp_path / "second.sock"
    file.write_bytes(b"A" * MIB + b"B" * MIB)
    emulator = subprocess.Popen(
        [sys.executable, "-m", "gmemd.emulator.main", "-machine", "none", "-qmp", f"unix:{sock},server=on,wait=off",
         "-object", f"memory-backend-file,id=ram-node0,size=1M,offset=1M,mem-path={file},share=on"])
    try:
        with Client(sock, timeout=PATIENCE, wait=PATIENCE):
            pass
        found: dict[str, Any] = {}
        exec(program.replace("/tmp/second.sock", str(sock)), found)
        assert (len(found["memory"]), found["memory"][:1]) == (MIB, b"B")
        found["memory"].close()
        os.close(found["fd"])
    finally:
        emulator.terminate()
        emulator.wait(PATIENCE)


def test_what_is_to_be_installed_is_there() -> None:
    """The files that the blocks for a host name exist."""
    named = {word for page in ALL for kind, text in blocks(page) if kind == "host" for word in text.split()
             if word.startswith("systemd/")}
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).is_file()] == []


@needs("qemu-system-x86_64")
@pytest.mark.parametrize(("page", "name"), [("docs/qemu.md", "vm1"), ("docs/gmemctl.md", "ram0")])
def test_the_qemu_block_runs(tmp_path: Path, page: str, name: str) -> None:
    """The QEMU of the page starts, and has all of the object mapped."""
    [text] = [text for word, text in blocks(ROOT / page) if word == "qemu"]
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": name, "size": 64 << 20})
        with subprocess.Popen(["bash", "-ec", text], env=user_environment(tmp_path, daemon), cwd=tmp_path,
                              start_new_session=True) as process:
            try:
                while not any(holder["mapped"] == 64 << 20 and holder["comm"].startswith("qemu")
                              for holder in client.execute("query-memdev-holders", {"id": name})):
                    assert process.poll() is None
            finally:
                os.killpg(process.pid, signal.SIGKILL)


@needs("qemu-system-x86_64")
def test_the_captured_qemu_runs_on_the_object(tmp_path: Path) -> None:
    """The QEMU of the page, which knows nothing of gmemd, has all of the object mapped."""
    [text] = [text for word, text in blocks(ROOT / "docs/qemu.md") if word == "capture"]
    with Daemon(kernel="simulated") as daemon, daemon.client() as client, \
            subprocess.Popen(["bash", "-ec", text], env=user_environment(tmp_path, daemon), cwd=tmp_path,
                             start_new_session=True) as process:
        try:
            wait_for(lambda: client.execute("query-memdev"))
            while not any(holder["mapped"] == 64 << 20 and holder["comm"].startswith("qemu")
                          for holder in client.execute("query-memdev-holders", {"id": "vm2"})):
                assert process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@needs("qemu-system-x86_64")
def test_the_adopted_memory_outlives_its_qemu(tmp_path: Path) -> None:
    """The lines of the page work, and the object is there when QEMU is not."""
    [text] = [text for word, text in blocks(ROOT / "docs/qemu.md") if word == "adopt"]
    with Daemon(kernel="simulated") as daemon, daemon.client() as client:
        done = subprocess.run(["bash", "-ec", text.replace("/tmp/", f"{tmp_path}/")], capture_output=True, text=True,
                              env=user_environment(tmp_path, daemon), timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for(lambda: client.execute("query-memdev-holders", {"id": "vm3"}) == [])
        assert client.execute("query-memdev-status")[0]["resident"] > 0


def test_links_lead_somewhere() -> None:
    """Every relative link of README and docs names an existing file."""
    lost = [(page.name, link) for page in ALL for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
            if not (page.parent / link).exists()]
    assert lost == []

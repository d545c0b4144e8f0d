"""A private libvirt for tests: the QEMU driver inside virsh, on a directory of its own, with gmemd-emulator.

    with Libvirt() as libvirt, libvirt.virsh() as virsh:
        virsh.run("create domain.xml")

Each `virsh()` is a libvirt process of its own: a second one finds the running domains, as a restarted libvirtd does.
One at a time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "libvirt"
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"

_EMULATOR = """\
#!{python}
import sys
sys.path.insert(0, {root!r})
from gmemd.emulator.main import main
sys.exit(main())
"""


class Libvirt:
    """A directory with libvirt's configuration and state, and the emulator it is given."""

    def __init__(self) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="gmemd-virt-"))  # short: it is part of socket paths
        self.root = self.dir / "root"
        (self.root / "etc").mkdir(parents=True)
        user = 'user = "root"\n' if os.getuid() == 0 else ""
        (self.root / "etc" / "qemu.conf").write_text(f'stdio_handler = "file"\n{user}')
        self.emulator = self.dir / "gmemd-emulator"
        self.emulator.write_text(_EMULATOR.format(python=sys.executable, root=str(ROOT)))
        self.emulator.chmod(0o755)
        own = {f"XDG_{what}_HOME": str(self.dir / "xdg" / what) for what in ("CACHE", "CONFIG")}
        own["XDG_RUNTIME_DIR"] = str(self.dir / "xdg" / "run")
        for path in own.values():
            Path(path).mkdir(parents=True)
        log = {"LIBVIRT_LOG_OUTPUTS": f"3:file:{self.dir / 'libvirt.log'}"}
        # virsh repeats what it reads, on one line if that is long enough.
        self.environ = {**os.environ, "LC_ALL": "C", "TERM": "dumb", "COLUMNS": "9999", **own, **log}

    def file(self, name: str, text: str) -> Path:
        """Write a file into the directory and give its path."""
        path = self.dir / name
        path.write_text(text)
        return path

    def example(self, name: str, environ: dict[str, str] | None = None, arguments: list[str] | None = None) -> Path:
        """One of the example domains, with this emulator, `environ` for it and more `arguments` on its command line."""
        text = (EXAMPLES / name).read_text()
        text = re.sub(r"<emulator>.*</emulator>", f"<emulator>{self.emulator}</emulator>", text)
        if environ or arguments:
            more = "".join(f"<qemu:env name='{key}' value='{value}'/>" for key, value in (environ or {}).items())
            more += "".join(f"<qemu:arg value='{word}'/>" for word in arguments or [])
            text = re.sub(r"  <qemu:commandline>.*?</qemu:commandline>\n", "", text, flags=re.DOTALL)
            text = re.sub(r"<domain type='(\w+)'[^>]*>", rf"<domain type='\1' xmlns:qemu='{QEMU_NAMESPACE}'>", text)
            text = text.replace("</domain>", f"<qemu:commandline>{more}</qemu:commandline></domain>")
        return self.file(name, text)

    def pid(self, domain: str) -> int:
        """The process id of a domain's emulator."""
        [path] = self.dir.rglob(f"{domain}.pid")
        return int(path.read_text())

    def log(self, domain: str) -> str:
        """The command line and what the emulator said."""
        return "\n".join(path.read_text() for path in self.dir.rglob(f"{domain}.log"))

    @contextmanager
    def virsh(self) -> Iterator[Virsh]:
        """A libvirt process, ended at the end."""
        session = Virsh(self)
        try:
            yield session
        finally:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for path in self.dir.rglob("qemu/**/*.pid"):
            if path.name != "driver.pid":
                with suppress(ValueError, ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)


class Virsh:
    """A virsh that runs one command after the other."""

    def __init__(self, libvirt: Libvirt) -> None:
        self._count = 0
        self._process = subprocess.Popen(
            ["virsh", "-q", "-c", f"qemu:///embed?root={libvirt.root}"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=libvirt.environ, cwd=libvirt.dir)

    def run(self, command: str) -> str:
        """What a command prints; AssertionError if it fails."""
        text = self._output(command)
        assert not re.search(r"^error: ", text, re.MULTILINE), f"{command}: {text}"
        return text

    def fails(self, command: str) -> str:
        """What a command that must fail says."""
        text = self._output(command)
        assert re.search(r"^error: ", text, re.MULTILINE), f"{command} did not fail: {text}"
        return text

    def qmp(self, domain: str, command: str, **arguments: Any) -> Any:
        """The reply of a QMP command through libvirt."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        text = json.dumps({"execute": command, "arguments": names})
        return json.loads(self.run(f"qemu-monitor-command {domain} '{text}'"))

    def wait_state(self, domain: str, state: str) -> None:
        """Wait until a domain is in a state: libvirt follows events in its own time."""
        end = time.monotonic() + PATIENCE
        while (found := self._output(f"domstate {domain}").strip()) != state:
            assert time.monotonic() < end, f"{domain} is {found}, not {state}"
            time.sleep(0.02)

    def _output(self, command: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._count += 1
        mark = f"@@{self._count}@@"
        self._process.stdin.write(f"{command}\necho {mark}\n".encode())
        self._process.stdin.flush()
        timer = threading.Timer(PATIENCE, self._process.kill)
        timer.start()
        text = b""
        try:
            # The mark comes twice: with the command, which virsh repeats, and as its output.
            while text.count(mark.encode()) < 2:
                found = os.read(self._process.stdout.fileno(), 65536)
                assert found, f"virsh has ended in '{command}': {text.decode()}"
                text += found
        finally:
            timer.cancel()
        answer, _, _ = text.decode().partition(f"echo {mark}")
        _, _, answer = answer.partition(f"{command}\n")
        return answer.removesuffix("virsh # ").strip("\n")

    def close(self) -> None:
        """End it; domains go on."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.stdout.close()  # type: ignore[union-attr]
        self._process.wait(PATIENCE)

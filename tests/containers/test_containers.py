"""gmemd and its clients in containers: memory passes from one to another through the socket in a volume."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gmemd import __version__
from gmemd.client.client import Client
from tests.containers.conftest import Image
from tests.containers.podman import Podman
from tests.patience import PATIENCE
from tests.systemd import boot

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CLIENT = Path(__file__).with_name("client.py")
MEMFD = "qom-type=memory-backend-memfd"
GUEST_MEMFD = ("qom-type=memory-backend-memfd", "guest-memfd=on")
LOCKED_UP = ("--pull=never", "--network=none", "--read-only", "--cap-drop=all",
             "--security-opt=no-new-privileges")
GROUP = 10001  # of the image: may open the socket
STOP = 10.0  # seconds

Serve = Callable[..., contextlib.AbstractContextManager["Server"]]
_volumes = (f"gmemd-{number}" for number in itertools.count())


@dataclass
class Server:
    """A container that serves, and the volume with its socket."""

    podman: Podman
    image: Image
    name: str
    volume: str

    def client(self, *words: str, user: str = f"10002:{GROUP}", status: int = 0) -> str:
        """Run client.py in a container that shares nothing but the volume; give its output."""
        done = self.podman.command(
            "podman", "run", "--rm", "--no-healthcheck", *LOCKED_UP, f"--user={user}",
            f"--volume={self.volume}:/run/gmemd", f"--volume={CLIENT}:/client.py:ro", "--entrypoint=python",
            self.image.name, "/client.py", *words, status=status)
        return done.stdout.strip() if status == 0 else done.stderr

    def socket(self) -> str:
        """Return the path of its socket, as seen here."""
        directory = self.podman("volume", "inspect", "--format={{.Mountpoint}}", self.volume)
        return self.podman.seen_from_here(f"{directory}/qmp.sock")

    def kernel(self, name: str) -> str:
        """Return what has made the memory of an object."""
        with Client(self.socket(), timeout=PATIENCE, wait=PATIENCE) as client:
            kernels = {status["id"]: str(status["kernel"]) for status in client.execute("query-memdev-status")}
        return kernels[name]

    def keeper(self) -> int:
        """Return the pid, as seen here, of the container's pid 1."""
        return int(self.podman("inspect", "--format={{.State.Pid}}", self.name))

    def daemon(self) -> int:
        """Return the pid, as seen here, of the daemon."""
        keeper = self.keeper()
        [pid] = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        return int(pid)


@pytest.fixture
def serve(podman: Podman, image: Image) -> Serve:
    """Start a server container with these options of `podman run`; it is stopped at the end."""

    @contextlib.contextmanager
    def serve(*options: str) -> Iterator[Server]:
        volume = next(_volumes)
        name = podman("run", "--detach", *LOCKED_UP, f"--volume={volume}:/run/gmemd", *options, image.name)
        yield Server(podman, image, name, volume)
        podman("stop", f"--time={STOP:.0f}", name)
        log = podman.command("podman", "logs", name)
        assert podman("inspect", "--format={{.State.ExitCode}}", name) == "0", log.stdout + log.stderr
        assert "Traceback" not in log.stderr
        podman("rm", name)

    return serve


def test_the_image(podman: Podman, image: Image, record_property: Callable[[str, object], None]) -> None:
    """The image runs as a numeric user, not root, has a health check, and has no installer."""
    record_property("figure", f"image: {image.size / 1e6:.0f} MB, built in {image.build_seconds:.1f} s "
                              f"on a base made in {image.base_seconds:.1f} s")
    [described] = json.loads(podman("image", "inspect", image.name))

    assert described["Config"]["User"] == "10001:10001"
    assert list(described["Config"]["Volumes"]) == ["/run/gmemd"]
    assert described["Healthcheck"]["Test"][0] == "CMD"
    version = podman("run", "--rm", *LOCKED_UP, "--entrypoint=gmemd", image.name, "--version")
    assert version == f"gmemd {__version__} ({'compiled' if os.environ.get('GMEMD_COMPILE') == '1' else 'pure Python'})"
    pip = podman.command("podman", "run", "--rm", *LOCKED_UP, "--entrypoint=pip", image.name, status=None)
    assert pip.returncode != 0


def test_clients_share_memory(serve: Serve) -> None:
    """What one client container writes into an object, a second one reads; the memory is not copied."""
    with serve() as server:
        server.client("write", "hello from next door", MEMFD, "id=ram0")
        assert server.client("read", "ram0", user=f"10003:{GROUP}") == "hello from next door"


def test_only_the_group_may_connect(serve: Serve) -> None:
    """A client outside of the group cannot open the socket, one with it as an additional group can."""
    with serve() as server:
        refused = server.client("write", "x", MEMFD, "id=ram0", user="10004:10004", status=1)
        assert "PermissionError" in refused
        server.client("write", "x", MEMFD, "id=ram0")


def test_memory_survives_the_daemon(serve: Serve, record_property: Callable[[str, object], None]) -> None:
    """Killed inside of its container, the daemon comes back with the object; the container runs on."""
    with serve() as server:
        server.client("write", "still here", MEMFD, "id=ram0")
        keeper, daemon = server.keeper(), server.daemon()
        start = time.monotonic()
        os.kill(daemon, signal.SIGKILL)
        assert server.kernel("ram0")
        record_property("figure", f"container: kill of the daemon to the first answer "
                                  f"{(time.monotonic() - start) * 1e3:.0f} ms")
        assert server.client("read", "ram0") == "still here"
        assert server.keeper() == keeper
        assert server.daemon() != daemon


def test_container_restart_is_told(serve: Serve) -> None:
    """A restart of the container ends the keeper, and memory with it: the object is listed as lost, not remade."""
    with serve() as server:
        server.client("write", "going", MEMFD, "id=ram0")
        server.podman("restart", f"--time={STOP:.0f}", server.name)
        with Client(server.socket(), timeout=PATIENCE, wait=PATIENCE) as client:
            assert [lost["id"] for lost in client.execute("query-memdev-lost")] == ["ram0"]
            client.execute("object-del", {"id": "ram0"})
        server.client("write", "new", MEMFD, "id=ram0")


@pytest.mark.kvm
@pytest.mark.parametrize("filtered", [True, False], ids=["default filter", "filter with cachestat"])
def test_guest_memfd(serve: Serve, kvm_device: str, seccomp: str, *, filtered: bool) -> None:
    """With /dev/kvm an object is a real guest_memfd, whatever filters system calls, and survives the daemon too."""
    options = [] if filtered else [f"--security-opt=seccomp={seccomp}"]
    with serve(f"--device={kvm_device}:/dev/kvm", *options) as server:
        server.client("write", "in guest memory", *GUEST_MEMFD, "id=gm0")
        os.kill(server.daemon(), signal.SIGKILL)
        assert server.client("read", "gm0") == "in guest memory"
        assert server.kernel("gm0") == "kvm"


def test_without_kvm(serve: Serve) -> None:
    """Without /dev/kvm guest_memfd is simulated, and says so."""
    with serve() as server:
        server.client("write", "in simulated memory", *GUEST_MEMFD, "id=gm0")
        assert server.client("read", "gm0") == "in simulated memory"
        assert server.kernel("gm0") == "simulated"


def test_health(serve: Serve) -> None:
    """The health check asks the daemon itself."""
    with serve() as server:
        server.client("write", "x", MEMFD, "id=ram0")  # it is there
        server.podman("healthcheck", "run", server.name)


@pytest.mark.skipif(bool(boot.missing()), reason=f"a boot of systemd needs {boot.missing()}")
def test_memory_kept_by_systemd(podman: Podman, image: Image, seccomp: str,
                                record_property: Callable[[str, object], None]) -> None:
    """With systemd around the container memory survives the container, too."""
    booted = boot.boot(["-m", "tests.containers.booted", image.name, str(Path("/podman", Path(seccomp).name))],
                       mounts={"/podman": str(podman.directory)}, inside=podman.enter)
    assert booted.status == 0, booted.log
    record_property("figure", f"container under systemd, to the first answer: {booted.reports[0]}")


@pytest.fixture
def seccomp(podman: Podman) -> str:
    """Podman's filter of system calls and the one it lacks: guest memory is measured by cachestat."""
    default = Path("/usr/share/containers/seccomp.json")
    if not default.exists():
        pytest.skip(f"needs {default}")
    profile = json.loads(default.read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name != "cachestat"]
    profile["syscalls"].append({"names": ["cachestat"], "action": "SCMP_ACT_ALLOW"})
    return str(podman.write("seccomp.json", json.dumps(profile)))


@pytest.fixture(scope="module")
def kvm_device(podman: Podman) -> str:
    """A device node of KVM that the container's group may open; the machine's own is often for root only."""
    node = podman.directory / "kvm"
    podman.command("mknod", "-m", "0660", node, "c", "10", "232")
    podman.command("chgrp", str(GROUP), node)
    return str(node)

"""Objects on their way between two gmemd, as a person sends them with gmemctl."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd, state
from tests.guests import firmware
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT
from tests.programs import gmemctl as words
from tests.robustness.moves import Wire

pytestmark = pytest.mark.e2e
SIZE = 4 << 20
PAGE = 4096
KINDS = ("memory-backend-memfd", "memory-backend-guest-memfd")

# Holds the memory of an object and writes it, page after page and round after round, until it is stopped.
WRITER = """
import mmap, sys
from gmemd.client.client import Client
with Client(sys.argv[1]) as client:
    info, [fd] = client.execute_fds("memdev-get-fd", {"id": "x"})
memory = mmap.mmap(fd, info["size"])
print(fd, flush=True)
number = 0
while True:
    number += 1
    at = number * 4096 % len(memory)
    memory[at:at + 8] = number.to_bytes(8, "little")
"""


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[RunningGmemd, RunningGmemd]]:
    own = ("--snapshots", "{directory}/snapshots")
    with RunningGmemd(*own, keep=True) as here, RunningGmemd(*own, keep=True) as there:
        yield here, there


@pytest.fixture
def here(two: tuple[RunningGmemd, RunningGmemd]) -> Iterator[RunningGmemd]:
    """The first of them, with nothing on either."""
    yield two[0]
    for gmemd in two:
        with gmemd.client() as client:
            for entry in client.execute("query-memdev"):
                client.execute("object-del", {"id": entry["id"]})
            for move in client.execute("query-memdev-moves"):
                client.execute("object-del", {"id": move["id"]})


@pytest.fixture
def there(two: tuple[RunningGmemd, RunningGmemd]) -> RunningGmemd:
    return two[1]


def gmemctl(gmemd: RunningGmemd, *arguments: str, status: int = 0, **options: Any) -> tuple[str, str]:
    """What gmemctl says, and complains."""
    done = subprocess.run(words("--socket", gmemd.socket, *arguments), capture_output=True, text=True, cwd=ROOT,
                          timeout=PATIENCE, check=False, **options)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def create(gmemd: RunningGmemd, kind: str = KINDS[0], content: bytes = b"") -> None:
    with gmemd.client() as client:
        client.execute("object-add", {"qom-type": kind, "id": "x", "size": SIZE, "share": True})
        if content:
            _, [fd] = client.execute_fds("memdev-get-fd", {"id": "x"})
            os.pwrite(fd, content, PAGE)
            os.close(fd)


def content_of(gmemd: RunningGmemd, name: str = "x") -> bytes:
    with gmemd.client() as client:
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": name})
    found = os.pread(fd, SIZE, 0)
    os.close(fd)
    return found


def states(gmemd: RunningGmemd) -> list[str]:
    with gmemd.client() as client:
        return [move["state"] for move in client.execute("query-memdev-moves")]


def test_a_copy_goes_through_a_pipe(here: RunningGmemd, there: RunningGmemd) -> None:
    """As through ssh; only what is there is sent."""
    create(here, content=b"hello")
    program = " ".join(words())
    script = f"{program} --socket {here.socket} export x | {program} --socket {there.socket} -o name import --id y"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, "y\n"), done.stderr
    assert content_of(there, "y") == content_of(here) == b"\0" * PAGE + b"hello" + b"\0" * (SIZE - PAGE - 5)
    with there.client() as client:
        assert client.execute("query-memdev-status", {"id": "y"})[0]["resident"] == PAGE


def test_a_damaged_copy_makes_nothing(here: RunningGmemd, there: RunningGmemd, tmp_path: Path) -> None:
    """One sentence, and no object; tests/snapshots/test_stream.py damages everything else."""
    create(here, content=os.urandom(5 * PAGE))
    file = tmp_path / "x"
    with file.open("wb") as out:
        subprocess.run(words("--socket", here.socket, "export", "x"), stdout=out, cwd=ROOT, check=True,
                       timeout=PATIENCE)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 8
    file.write_bytes(flipped)
    with file.open() as stream:
        assert "the stream is damaged" in gmemctl(there, "import", status=1, stdin=stream)[1]
    with there.client() as client:
        assert client.execute("query-memdev") == []
    file.write_bytes(whole)
    with file.open() as stream:
        gmemctl(there, "import", stdin=stream)
    assert content_of(there) == content_of(here)


def test_an_object_moves_there_and_back(here: RunningGmemd, there: RunningGmemd) -> None:
    """By a socket and by a command; the tombstone keeps its id until the object comes back, over kills of both."""
    create(here, content=b"hello" * 1000)
    before = content_of(here)
    gmemctl(here, "move", "x", "--to", f"unix:{there.socket}")
    for gmemd in (here, there):
        gmemd.crash()
    assert (states(here), states(there)) == (["gone"], ["owned"])
    assert content_of(there) == before
    said = gmemctl(here, "create", "memory-backend-ram,id=x,size=4M", status=1)[1]
    assert f"object 'x' was moved to unix:{there.socket}: object-del forgets that and frees the id" in said
    assert "it was moved to" in gmemctl(here, "show", "x", status=1)[1]
    gmemctl(there, "move", "x", "--to", f"exec:{' '.join(words('--socket', here.socket))} import --move")
    assert content_of(here) == before
    assert (states(here), states(there)) == (["owned"], ["gone"])
    assert '"generation": 2' in gmemctl(here, "-o", "json", "moves")[0]
    gmemctl(there, "rm", "x")
    assert states(there) == []


@pytest.fixture
def writer(here: RunningGmemd, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that writes the object, as a guest does, and its descriptor of it."""
    create(here, request.param)
    process = subprocess.Popen([sys.executable, "-c", WRITER, here.socket], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    with process:
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.mark.parametrize("writer", KINDS, indirect=True)
def test_precopy(here: RunningGmemd, there: RunningGmemd, writer: tuple[subprocess.Popen[str], int]) -> None:
    """Memory that is written all the time arrives as it was when the writer was stopped, which then stays so."""
    process, fd = writer
    gmemctl(here, "move", "x", "--to", f"unix:{there.socket}", "--via", "freeze", "--deadline", "60000")
    assert state(process.pid) == "T"
    with open(f"/proc/{process.pid}/fd/{fd}", "rb") as memory:
        assert content_of(there) == memory.read()
    assert content_of(there).count(0) < SIZE
    here.crash()
    assert state(process.pid) == "T"  # the next daemon does not let it go on, either


@pytest.mark.parametrize("writer", KINDS[:1], indirect=True)
def test_too_long_a_stop_leaves_it_here(here: RunningGmemd, there: RunningGmemd,
                                        writer: tuple[subprocess.Popen[str], int]) -> None:
    """At the deadline the writer goes on, and the object stays."""
    process, _ = writer
    said = gmemctl(here, "move", "x", "--to", f"unix:{there.socket}", "--via", "freeze", "--deadline", "1", status=1)[1]
    assert "the deadline of 1 ms has passed" in said or "does not stop" in said
    wait_for(lambda: state(process.pid) in "RS")
    assert (states(here), states(there)) == (["kept"], [])


@pytest.mark.parametrize("kind", KINDS)
def test_postcopy_is_refused(here: RunningGmemd, there: RunningGmemd, kind: str) -> None:
    """With the reason; nothing has happened."""
    create(here, kind)
    said = gmemctl(here, "move", "x", "--to", f"unix:{there.socket}", "--postcopy", status=1)[1]
    assert "postcopy is refused: " in said
    assert "userfaultfd" in said
    assert ("guest_memfd takes no userfaultfd for missing pages (Linux 7.3: EINVAL)" in said) == ("guest" in kind)
    assert (states(here), states(there)) == ([], [])


def test_what_cannot_be_moved_stays(here: RunningGmemd, there: RunningGmemd, tmp_path: Path) -> None:
    """A file, an id that is taken there, a gmemd that keeps nothing, a way that leads nowhere."""
    to = ("--to", f"unix:{there.socket}")
    gmemctl(here, "create", f"memory-backend-file,id=f,size=4M,mem-path={tmp_path}/f,share=on")
    assert "is a file: copy the file" in gmemctl(here, "move", "f", *to, status=1)[1]
    create(here, content=b"hello")
    create(there)
    assert "duplicate property 'x'" in gmemctl(here, "move", "x", *to, status=1)[1]
    assert "not by 'unfenced'" in gmemctl(here, "move", "x", *to, "--via", "unfenced", status=1)[1]
    gmemctl(here, "move", "x", "--to", "nowhere", status=2)
    assert "ends early" in gmemctl(here, "move", "x", "--to", "exec:true", status=1)[1]
    assert "give it up" in gmemctl(here, "move", "x", *to, "--dry-run")[0]
    assert "is not in the middle of a move" in gmemctl(here, "move", "f", *to, "--resolve", status=1)[1]
    with RunningGmemd() as careless:
        said = gmemctl(here, "move", "x", "--to", f"unix:{careless.socket}", status=1)[1]
        assert "objects are not kept here, so a move could not be durable" in said
    assert states(here) == ["kept"]
    assert content_of(here)[PAGE:PAGE + 5] == b"hello"


def test_a_killed_gmemctl_stops_nothing(here: RunningGmemd, there: RunningGmemd) -> None:
    """The line belongs to the two daemons: the move ends as if it had been waited for."""
    create(here, content=os.urandom(PAGE) * 900)
    before = content_of(here)
    with here.client() as client:
        process = subprocess.Popen(words("--socket", here.socket, "move", "x", "--to", f"unix:{there.socket}"),
                                   cwd=ROOT)
        wait_for(lambda: jobs(client))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: all(job["status"] == "concluded" for job in jobs(client)))
    wait_for(lambda: states(there) == ["owned"])
    assert states(here) == ["gone"]
    assert content_of(there) == before


def jobs(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.execute("query-jobs")
    return found


def test_a_person_decides_where_the_other_side_is_lost(here: RunningGmemd) -> None:
    """What was given up to a gmemd that is gone for good is taken back, by force only."""
    create(here, content=b"hello")
    with RunningGmemd(keep=True) as lost:
        line = f"unix:{lost.socket}"
        with lost.client() as client, here.client() as mine:
            give_up(mine, client)
        assert states(here) == ["moved"]
        assert "which has not confirmed it" in gmemctl(here, "rm", "x", status=1)[1]
        assert states(lost) == ["prepared"]
        with lost.client() as client:
            client.execute("memdev-move-resolve", {"id": "x", "force": "there"})
        assert "knows nothing of this move" in gmemctl(here, "move", "x", "--resolve", "--to", line, status=1)[1]
    assert "would take it that 'x' is owned here" in gmemctl(here, "move", "x", "--force", "here", "--dry-run")[0]
    gmemctl(here, "move", "x", "--force", "here")
    assert states(here) == ["kept"]
    assert content_of(here)[PAGE:PAGE + 5] == b"hello"


@needs_qemu
def test_a_guest_goes_on_elsewhere(here: RunningGmemd, there: RunningGmemd, tmp_path: Path) -> None:
    """A QEMU's guest moves with its devices: it was started once, and counts on from where it was stopped."""
    gmemctl(here, "create", f"memory-backend-memfd,id=x,size={firmware.SIZE},share=on")
    with tempfile.TemporaryFile() as scratch:  # who maps the object itself would be stopped with the guest
        os.truncate(scratch.fileno(), firmware.SIZE)
        guest = firmware.FirmwareGuest(tmp_path, scratch.fileno(), "x")
    with subprocess.Popen(words("--socket", here.socket, "exec", "x", "--", *guest.command("one")), cwd=ROOT) as first:
        try:
            wait_for(lambda: counted(here)[1] > 0)
            gmemctl(here, "move", "x", "--to", f"unix:{there.socket}", "--qmp", str(guest.qmp("one")), "--device-state",
                    "--quit", "--deadline", "60000")
            assert first.wait(PATIENCE) == 0
        finally:
            first.kill()
    starts, count = counted(there)
    assert (starts, count > 0) == (1, True)
    with subprocess.Popen(words("--socket", there.socket, "rollback", "x", "--qmp", str(guest.qmp("two")), "--",
                                *guest.command("two", qmp=False)), cwd=ROOT) as second:
        try:
            wait_for(lambda: counted(there)[1] != count or second.poll() is not None)
            assert counted(there)[0] == 1
            assert counted(there)[1] - count > 0
            assert second.poll() is None
        finally:
            second.terminate()
    gmemctl(there, "snapshot", "rm", "x@1")


def counted(gmemd: RunningGmemd) -> tuple[int, int]:
    """How often the firmware guest was started, and where it is."""
    found = content_of(gmemd)
    return int.from_bytes(found[0x1000:0x1004], "little"), int.from_bytes(found[0x1004:0x1008], "little")


def give_up(here: Client, there: Client) -> None:
    """Move an object over a line that ends just before YOUR."""
    wire = Wire(lambda number, when: wire.cut() if wire.seen[-1] == "YOUR" and when == "before" else None)
    try:
        there.execute("getfd", {"fdname": "l"}, fds=[wire.destination.fileno()])
        there.execute("memdev-import", {"fdname": "l", "answers": "l", "job-id": "in"})
        here.execute("getfd", {"fdname": "l"}, fds=[wire.source.fileno()])
        here.execute("memdev-move", {"id": "x", "fdname": "l", "to": "the lost one", "job-id": "out"})
        end = time.monotonic() + PATIENCE
        while any(job["status"] != "concluded" for client in (here, there) for job in jobs(client)):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        wire.close()
    here.execute("job-dismiss", {"id": "out"})

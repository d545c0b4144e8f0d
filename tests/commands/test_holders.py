"""Who holds memory: found whatever the file system shows, and nobody else."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.commands.holders import HolderFinder
from gmemd.errors import QmpError
from gmemd.kernel.maps import shown
from gmemd.processes.holders import Holder, Memory, Shown, holders_of, is_mapped
from tests.commands.live import LiveMachine
from tests.patience import wait_for

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE

# Maps a part of a file and, when asked to, keeps nothing else of it.
HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(fd, int(sys.argv[3]), offset=int(sys.argv[2]))
os.closerange(3, 100)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    """A machine that has given every fd back in the end."""
    before = set(os.listdir("/proc/self/fd"))
    made = LiveMachine()
    yield made
    await made.close()
    wait_for(lambda: set(os.listdir("/proc/self/fd")) == before)  # what takes long to close is closed in a thread


@contextmanager
def holder(path: str, offset: int = 0, size: int = SIZE) -> Iterator[int]:
    """A process that has the part of the file mapped; its id."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, path, str(offset), str(size)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        try:
            yield child.pid
        finally:
            child.kill()


async def add(live: LiveMachine, name: str, path: Path, offset: int = 0) -> None:
    await live.do("object-add", qom_type="memory-backend-file", id=name, size=SIZE, offset=offset,
                  mem_path=str(path), share=True)


async def found(live: LiveMachine, name: str) -> list[tuple[int, int]]:
    """Process and mapped bytes of each holder, by the command; HTTP must say the same."""
    said = [(row["pid"], row["mapped"]) for row in await live.do("query-memdev-holders", id=name)]
    finder = HolderFinder()
    backend = live.gmemd.objects.find(name)
    by_http = (await finder.find([backend]))[backend]
    assert said == [(one.pid, one.mapped) for one in by_http]
    return said


@contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """A folder of an overlay."""
    for name in ("top", "lower", "merged"):
        (folder / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder / "top"], check=True)
    try:
        (folder / "top/upper").mkdir()
        (folder / "top/work").mkdir()
        options = f"lowerdir={folder}/lower,upperdir={folder}/top/upper,workdir={folder}/top/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", folder / "merged"], check=True)
        try:
            yield folder / "merged"
        finally:
            subprocess.run(["umount", folder / "merged"], check=True)
    finally:
        subprocess.run(["umount", folder / "top"], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount an overlay")
async def test_on_an_overlay(tmp_path: Path) -> None:
    """maps has the device of the file system below, fstat that of the overlay: who maps it is found all the same."""
    with overlay(tmp_path) as folder:
        live = LiveMachine()
        await add(live, "ram", folder / "ram")
        fd = live.gmemd.objects.find("ram").fd
        [seen] = shown([fd])
        status = os.fstat(fd)
        assert seen[:2] != (f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino))
        with holder(str(folder / "ram")) as pid:
            assert await found(live, "ram") == [(pid, SIZE)]
            start = next(line.split("-")[0] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
                         if line.endswith("/ram"))
            assert is_mapped(pid, seen, int(start, 16), SIZE)
            assert not is_mapped(pid, seen, int(start, 16) + PAGE, SIZE)
        assert await found(live, "ram") == []
        await live.close()


async def test_who_maps_another_part_does_not_hold_it(live: LiveMachine, tmp_path: Path) -> None:
    """Of an object that is a part of a file only that part counts."""
    (tmp_path / "f").write_bytes(bytes(2 * SIZE))
    await add(live, "first", tmp_path / "f")
    await add(live, "second", tmp_path / "f", SIZE)
    with holder(str(tmp_path / "f"), SIZE) as pid:
        assert (await found(live, "first"), await found(live, "second")) == ([], [(pid, SIZE)])
    with holder(str(tmp_path / "f"), 4 * PAGE) as pid:
        assert (await found(live, "first"), await found(live, "second")) == ([(pid, SIZE // 2)], [(pid, SIZE // 2)])


def test_what_cannot_be_mapped_is_known_by_its_device(tmp_path: Path) -> None:
    """A file that is open for writing only, and a FIFO."""
    os.mkfifo(tmp_path / "fifo")
    fds = [os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT), os.open(tmp_path / "fifo", os.O_RDWR),
           os.memfd_create("m")]
    try:
        assert [one.inode for one in shown(fds)] == [str(os.fstat(fd).st_ino) for fd in fds]
        assert {one.target for one in shown(fds)} == {None}
    finally:
        for fd in fds:
            os.close(fd)


async def test_who_holds_it_still_is_the_same(live: LiveMachine, tmp_path: Path) -> None:
    """Two looks find equal holders, so that nothing is drawn again for the second."""
    await add(live, "ram", tmp_path / "f")
    backends = [live.gmemd.objects.find("ram")]
    with holder(str(tmp_path / "f")):
        first, second = [(await HolderFinder().find(backends))[backends[0]] for _ in range(2)]
        assert first == second != []


async def test_it_looks_for_what_the_object_was(live: LiveMachine, tmp_path: Path) -> None:
    """An object that goes, and whose descriptor's number another file gets, while the command is under way."""
    for name in ("f", "other"):
        (tmp_path / name).write_bytes(bytes(SIZE))
    below = [os.dup(0) for _ in range(50)]  # the numbers for what the look itself opens
    await add(live, "ram", tmp_path / "f")
    for fd in below:
        os.close(fd)
    number = live.gmemd.objects.find("ram").fd
    with holder(str(tmp_path / "f")) as pid, holder(str(tmp_path / "other")):
        asked = asyncio.create_task(live.do("query-memdev-holders", id="ram"))
        await asyncio.sleep(0)
        await live.do("object-del", id="ram")
        fd = os.open(tmp_path / "other", os.O_RDWR)
        os.dup2(fd, number)
        os.close(fd)
        try:
            assert [row["pid"] for row in await asked] == [pid]
        finally:
            os.close(number)


async def test_short_of_descriptors(live: LiveMachine, tmp_path: Path) -> None:
    """Without descriptors for looking it says so, and does not say that nobody holds the memory."""
    (tmp_path / "f").write_bytes(bytes(SIZE))
    await add(live, "ram", tmp_path / "f")
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    finder = HolderFinder()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for left, names in ((0, ("ram", "m")), (1, ("ram",))):
        taken: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + left, limits[1]))
        try:
            while True:
                try:
                    taken.append(os.dup(0))
                except OSError:
                    break
            for _ in range(left):
                os.close(taken.pop())
            for name in names:
                with pytest.raises(QmpError, match=r"cannot look for .*holders.*: Too many open files"):
                    await live.do("query-memdev-holders", id=name)
                assert await finder.find_soon([live.gmemd.objects.find(name)], 60) == {}
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert await found(live, "m") == []


# -- a /proc of our own


class Proc:
    """Processes as /proc shows them: those who map something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def maps(self, pid: int, device: str, inode: int, leads_to: Path | None = None) -> None:
        """A process that maps a page; `leads_to` is what map_files has, None: it may not be looked at."""
        place = self.folder / str(pid)
        for name in ("fd", "map_files"):
            (place / name).mkdir(parents=True)
        (place / "comm").write_text("vmm\n")
        (place / "cgroup").write_text("0::/machine\n")
        (place / "maps").write_text(f"00400000-00401000 rw-s 00000000 {device} {inode}    /memory\n")
        if leads_to is not None:
            (place / "map_files/400000-401000").symlink_to(leads_to)

    def holders(self, shown_as: dict[Memory, Shown]) -> dict[Memory, list[int]]:
        """Who holds each, by process."""
        seen: dict[Memory, list[Holder]] = holders_of(
            list(shown_as), {memory.file: seen for memory, seen in shown_as.items()}, str(self.folder))
        return {memory: [one.pid for one in found] for memory, found in seen.items()}


def test_files_that_are_shown_alike(tmp_path: Path) -> None:
    """As a btrfs snapshot's beside the original's: map_files tells them apart; where it may not be seen, all may be."""
    (tmp_path / "original").touch()
    (tmp_path / "snapshot").touch()
    files = {name: (status.st_dev, status.st_ino) for name in ("original", "snapshot")
             for status in [os.stat(tmp_path / name)]}
    proc = Proc(tmp_path / "proc")
    proc.maps(11, "00:28", 257, tmp_path / "original")
    proc.maps(12, "00:28", 257, tmp_path / "snapshot")
    proc.maps(13, "00:28", 257)
    proc.maps(14, "00:2a", 257)
    original, snapshot = (Memory(files[name], 0, PAGE) for name in ("original", "snapshot"))
    both = {original: Shown("00:28", "257", files["original"]), snapshot: Shown("00:28", "257", files["snapshot"])}
    assert proc.holders(both) == {original: [11, 13], snapshot: [12, 13]}
    assert proc.holders({original: both[original]}) == {original: [11, 13]}
    assert proc.holders({original: Shown("00:28", "257")}) == {original: [11, 12, 13]}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_is_not_an_absence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Looking at one process lacks something: that is not an answer."""
    proc = Proc(tmp_path / "proc")
    proc.maps(11, "00:01", 5)

    def listdir(path: Any) -> list[str]:
        if str(path).endswith("fd"):
            raise OSError(code, os.strerror(code))
        return ["11"]

    monkeypatch.setattr("gmemd.processes.holders.os.listdir", listdir)
    with pytest.raises(OSError, match=os.strerror(code)):
        holders_of([Memory((1, 5), 0, PAGE)], {}, str(proc.folder))

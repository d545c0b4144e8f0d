"""Head-room from the machine's and the cgroups' figures, in the shapes they come in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmemd.kernel.headroom import HeadroomReader, pool_headroom
from gmemd.kernel.hugepages import HugePool, huge_pools
from gmemd.kernel.kernel import Kernel
from tests.kernel.host import hugepage_size

MIB = 1 << 20
UNLIMITED_V1 = "9223372036854771712"


class Host:
    """A /proc and cgroup trees in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.write("proc/meminfo", "MemTotal: 8192 kB\nMemAvailable: 4096 kB\nHugePages_Total: 0\n")
        self.write("proc/self/cgroup", "")
        self.write("proc/self/mountinfo", "")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mount(self, line: str) -> None:
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(line.replace("ROOT", str(self.root)) + "\n")

    def v1(self, path: str, limit: str, usage: int = 0, stat: str = "") -> None:
        self.write(f"memory{path}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"memory{path}/memory.usage_in_bytes", f"{usage}\n")
        self.write(f"memory{path}/memory.stat", stat)

    def v2(self, path: str, limit: str, usage: int = 0, stat: str = "") -> None:
        self.write(f"unified{path}/memory.max", f"{limit}\n")
        self.write(f"unified{path}/memory.current", f"{usage}\n")
        self.write(f"unified{path}/memory.stat", stat)

    def read(self) -> tuple[int, int, str]:
        found = HeadroomReader(str(self.proc)).read()
        return found.available, found.total, found.limit


V1_MOUNT = "36 31 0:32 / ROOT/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "30 23 0:27 / ROOT/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_without_a_cgroup_the_machine_is_the_limit(host: Host) -> None:
    """MemAvailable of MemTotal, in bytes."""
    assert host.read() == (4 * MIB, 8 * MIB, "the machine")


def test_unlimited_cgroups_do_not_count(host: Host) -> None:
    """Version 1 writes 'no limit' as the last page below 2^63, version 2 as max."""
    host.mount(V1_MOUNT)
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "4:memory:/a\n1:cpu:/a\n0::/b\n")
    host.v1("/a", UNLIMITED_V1)
    host.v2("/b", "max")
    assert host.read() == (4 * MIB, 8 * MIB, "the machine")


def test_a_v1_limit_counts(host: Host) -> None:
    """Limit minus usage; clean file cache is not usage, dirty cache is."""
    host.mount(V1_MOUNT)
    host.write("proc/self/cgroup", "4:memory:/a\n")
    stat = f"inactive_file 99\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\ntotal_dirty {MIB // 2}\n"
    host.v1("/a", str(3 * MIB), 2 * MIB, stat)
    assert host.read() == (MIB + 3 * MIB // 2, 3 * MIB, "the cgroup /a")


def test_a_v2_limit_counts(host: Host) -> None:
    """The same from memory.max, memory.current and file_dirty."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/user/one\n")
    host.v2("/user/one", str(3 * MIB), 2 * MIB, f"inactive_file {MIB}\nfile_writeback {MIB // 4}\n")
    assert host.read() == (MIB + 3 * MIB // 4, 3 * MIB, "the cgroup /user/one")


def test_the_tightest_ancestor_counts(host: Host) -> None:
    """A limit above is a limit."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/user/one\n")
    host.v2("/user/one", str(3 * MIB), MIB)
    host.v2("/user", str(4 * MIB), 3 * MIB)
    assert host.read() == (MIB, 4 * MIB, "the cgroup /user")


def test_a_cgroup_over_its_limit_has_nothing_left(host: Host) -> None:
    """Never a negative number."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/one\n")
    host.v2("/one", str(MIB), 2 * MIB)
    assert host.read() == (0, MIB, "the cgroup /one")


def test_a_container_sees_its_own_cgroup_as_the_root(host: Host) -> None:
    """In a cgroup namespace the path is /, and the root has a limit."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/\n")
    host.v2("", str(3 * MIB), MIB)
    assert host.read() == (2 * MIB, 3 * MIB, "the cgroup /")


def test_a_container_without_a_namespace_has_the_host_path(host: Host) -> None:
    """The mount's root is the container's own path, which is then cut off."""
    host.mount(V1_MOUNT.replace(" / ROOT", " /docker/abc ROOT"))
    host.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    host.v1("", str(3 * MIB), MIB)
    assert host.read() == (2 * MIB, 3 * MIB, "the cgroup /")


def test_a_path_outside_the_namespace_is_clipped(host: Host) -> None:
    """A process moved here from outside shows as /../other: what is mounted here is what can be seen."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/../other\n")
    host.v2("", str(3 * MIB), MIB)
    assert host.read() == (2 * MIB, 3 * MIB, "the cgroup /")


def test_a_vanished_cgroup_limits_nothing(host: Host) -> None:
    """It may be removed, or the process moved, after it was found."""
    host.mount(V2_MOUNT)
    host.write("proc/self/cgroup", "0::/one\n")
    host.v2("/one", str(MIB), 0)
    reader = HeadroomReader(str(host.proc))
    assert reader.read().limit == "the cgroup /one"
    for path in (host.root / "unified/one").iterdir():
        path.unlink()
    assert reader.read().limit == "the machine"


def test_pools_of_huge_pages_are_read(tmp_path: Path) -> None:
    """Each size, the machine's pool before its nodes', as numbers."""
    for directory, figures in {
        "kernel/mm/hugepages/hugepages-2048kB": (8, 5, 1, 2, 4),
        "kernel/mm/hugepages/hugepages-1048576kB": (0, 0, 0, 0, 0),
        "devices/system/node/node1/hugepages/hugepages-2048kB": (8, 5, 1),
    }.items():
        names = ("nr", "free", "surplus", "resv", "nr_overcommit")
        (tmp_path / directory).mkdir(parents=True)
        for name, figure in zip(names, figures, strict=False):
            (tmp_path / directory / f"{name}_hugepages").write_text(f"{figure}\n")
    machine = HugePool(2 * MIB, None, total=8, free=5, surplus=1, reserved=2, overcommit=4)
    node = HugePool(2 * MIB, 1, total=8, free=5, surplus=1, reserved=0, overcommit=0)
    giant = HugePool(1 << 30, None, 0, 0, 0, 0, 0)
    assert huge_pools(str(tmp_path)) == [machine, node, giant]
    assert pool_headroom(machine).available == 6 * 2 * MIB  # 5 free, 2 promised, 3 more may be made
    assert pool_headroom(giant).available == 0


def test_a_kernel_gives_the_figures_of_its_host(kernel: Kernel) -> None:
    """What is read here is this machine's."""
    left = kernel.headroom()
    assert 0 < left.available < left.total
    assert str(left) == f"{left.available} of {left.total} bytes left in {left.limit}"
    sizes = {pool.page_size for pool in kernel.huge_pools()}
    assert sizes == set() or hugepage_size() in sizes


PROGRAM = """
import sys
from pathlib import Path
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.headroom import NoHeadroom
Path(sys.argv[1], "cgroup.procs").write_text("0")
kernel = choose_kernel("auto")
fd = kernel.create_guest_memfd(1 << 30, 3)
try:
    kernel.populate(fd, 0, 1 << 30, 2, fresh=True)
except NoHeadroom as exc:
    print(exc.headroom.limit, kernel.resident(fd))
"""


def test_a_real_limit_is_respected() -> None:
    """In a cgroup of 128 MiB a population of 1 GiB is refused, where the kernel alone would kill."""
    groups = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}
    for parent, limit in groups.items():
        directory = Path(parent, f"gmemd-test-{os.getpid()}")
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            if not (directory / limit).exists():
                continue
            (directory / limit).write_text(str(128 * MIB))
            done = subprocess.run([sys.executable, "-c", PROGRAM, directory], capture_output=True, text=True)
            assert done.stderr == ""
            assert done.stdout == f"the cgroup /{directory.name} 0\n"
            return
        finally:
            directory.rmdir()
    pytest.skip("needs leave to make a cgroup with a memory limit")

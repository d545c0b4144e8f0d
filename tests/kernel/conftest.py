"""Fixtures for the kernel's tests: both kernels, and the count of fds around each test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.hugepages import huge_pools
from gmemd.kernel.kernel import Kernel
from tests.kernel.host import fds

BOTH = [pytest.param("kvm", marks=pytest.mark.kvm), "simulated"]
HUGE = 2 << 20
POOL = "/proc/sys/vm/nr_hugepages"


@pytest.fixture(scope="session")
def kernels() -> Iterator[Callable[[str], Kernel]]:
    """Each kernel that this host has, made before any test counts what is open."""
    made = {kernel.name: kernel for kernel in map(choose_kernel, ("simulated", "auto"))}
    yield made.__getitem__
    for kernel in made.values():
        kernel.close()


@pytest.fixture(params=BOTH)
def kernel(request: pytest.FixtureRequest, kernels: Callable[[str], Kernel]) -> Kernel:
    """Both kernels in turn."""
    return kernels(request.param)


@pytest.fixture(autouse=True)
def no_fd_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test the same fds are open as before it."""
    if "kernels" in request.fixturenames:
        request.getfixturevalue("kernels")
    before = fds()
    yield
    assert before == fds()


@pytest.fixture
def make(kernel: Kernel) -> Iterator[Callable[..., int]]:
    """make(size, flags=3): a guest_memfd of the kernel; closed after the test."""
    made: list[int] = []

    def create(size: int, flags: int = 3) -> int:
        made.append(kernel.create_guest_memfd(size, flags))
        return made[-1]

    yield create
    for fd in made:
        os.close(fd)


@pytest.fixture
def huge_pages() -> Iterator[Callable[[int], None]]:
    """huge_pages(n): n free pages of 2 MiB for the time of the test; skips where that is not allowed."""

    def read() -> int:
        with open(POOL) as file:
            return int(file.read())

    def write(count: int) -> None:
        with open(POOL, "w") as file:
            file.write(str(count))

    added = 0

    def reserve(count: int) -> None:
        pool = next((p for p in huge_pools() if p.page_size == HUGE and p.node is None), None)
        if pool is None:
            pytest.skip("needs 2 MiB pages, this machine has none")
        nonlocal added
        try:
            before = read()
            write(before + count - (pool.free - pool.reserved))
            added = read() - before
        except OSError as exc:
            pytest.skip(f"needs leave to write {POOL}: {exc.strerror}")
        pool = next(p for p in huge_pools() if p.page_size == HUGE and p.node is None)
        if pool.free - pool.reserved != count:
            pytest.skip(f"needs {count} free pages of 2 MiB, the kernel gave {pool.free - pool.reserved}")

    yield reserve
    if added:
        write(read() - added)  # others may have changed the number meanwhile

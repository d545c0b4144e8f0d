"""Daemons that serve HTTP, shared by all tests that only read."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from tests.web.site import Site, fill

MANY = 10_000


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """HTTP on a unix socket, two objects: ram0 of 1 MiB, cvm0 of 64 pages with 16 private ones in the middle."""
    with Site() as made:
        _furnish(made)
        yield made


@pytest.fixture(scope="session")
def tcp_site() -> Iterator[Site]:
    """The same by TCP."""
    with Site(tcp=True) as made:
        _furnish(made)
        yield made


def _furnish(site: Site) -> None:
    with site.client() as client:
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": 1 << 20,
                                      "prealloc": True})
        client.execute("object-add", {"qom-type": "memory-backend-guest-memfd", "id": "cvm0", "size": 64 << 12})
        client.execute("memdev-convert", {"id": "cvm0", "offset": 16 << 12, "size": 16 << 12, "to": "private"})


@pytest.fixture(scope="session")
def crowd() -> Iterator[tuple[Site, int]]:
    """A daemon with MANY objects, or as many as descriptors are allowed here, and their number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with Site(tcp=True) as site:
            number = min(MANY, hard - 500)
            fill(site, number)
            yield site, number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""Daemons that serve HTTP, shared by the tests of a module: they only read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.web.site import Site


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """HTTP on a unix socket, two objects: ram0 of 1 MiB, cvm0 of 64 pages with 16 private ones in the middle."""
    with Site() as made:
        _furnish(made)
        yield made


@pytest.fixture(scope="module")
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

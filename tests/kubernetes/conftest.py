"""One API server for the tests of a file; its objects go after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.etcd import why_not


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    if why_not():
        pytest.skip(why_not())
    with ApiServer() as server:
        yield server


@pytest.fixture
def api(server: ApiServer) -> Iterator[ApiServer]:
    """The API server, empty."""
    yield server
    server.before = server.after = lambda method, path: None
    server.sharing = True
    for resource in ("resourceclaims", "resourceslices", "nodes"):
        for body in server.list(resource):
            server.remove(resource, body["metadata"]["name"], body["metadata"].get("namespace", ""))

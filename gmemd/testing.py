"""gmemd for your own tests: a daemon on a private socket, with the kernel that the test wants.

    def test_my_vmm(gmemd):
        with gmemd.client() as qmp:
            qmp.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram", "size": 1 << 20})

    @pytest.mark.gmemd(kernel="simulated:6.12")
    def test_without_mmap(gmemd): ...

The default is the simulated kernel, so a test means the same on every host. With `keep=True` the daemon runs under the
keeper: `crash()` then kills it, and its objects come back.

pytest finds this by itself and loads it at every start, so nothing is imported here until a test asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gmemd.client.running import RunningGmemd as RunningGmemd


def __getattr__(name: str) -> Any:
    """RunningGmemd, for use without the fixture."""
    if name != "RunningGmemd":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gmemd.client.running import RunningGmemd

    return RunningGmemd


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "gmemd(*arguments, kernel=..., keep=...): how the fixture gmemd is started")


@pytest.fixture
def gmemd(request: pytest.FixtureRequest) -> Iterator[RunningGmemd]:
    """A running gmemd, as the marker `gmemd` specifies it."""
    from gmemd.client.running import RunningGmemd

    marker = request.node.get_closest_marker("gmemd")
    arguments, options = (marker.args, marker.kwargs) if marker else ((), {})
    with RunningGmemd(*arguments, **options) as running:
        yield running

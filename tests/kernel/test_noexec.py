"""The seals of new memory under each setting of vm.memfd_noexec, in a pid namespace of its own.

F_SEAL_EXEC makes a memfd read-only in a live update (tests.persist.luo), so only the strictest setting may impose it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gmemd.kernel.uapi import F_SEAL_EXEC, F_SEAL_SEAL, SEALS_OF_SIZE

_MADE = """
import json
from gmemd.kernel.simulated import SimulatedKernel
from gmemd.backends.sealed import new_memfd
from gmemd.kernel.uapi import MFD_ALLOW_SEALING
kernel = SimulatedKernel()
print(json.dumps([kernel.seals(fd) for fd in (
    kernel.memfd_create("sealable", MFD_ALLOW_SEALING), kernel.memfd_create("plain", 0),
    new_memfd(kernel, "ram", 4096), kernel.create_guest_memfd(4096, 3))]))
"""


def seals(setting: int) -> list[int]:
    """Of a sealable memfd, one that is not, a ram backend's, and a simulated guest_memfd."""
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "sh", "-c",
         'echo "$1" >/proc/sys/vm/memfd_noexec && exec "$2" -c "$3"', "sh", str(setting), sys.executable, _MADE],
        capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "memfd_noexec" in done.stderr:
        pytest.skip(f"no pid namespace with a setting of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("setting", [0, 1])
def test_memory_can_be_written_after_a_live_update(setting: int) -> None:
    assert seals(setting) == [0, F_SEAL_SEAL, SEALS_OF_SIZE, SEALS_OF_SIZE | F_SEAL_SEAL]


def test_where_the_seal_is_imposed() -> None:
    """Then there is no other memfd, and gmemctl survive says what follows."""
    assert seals(2) == [F_SEAL_EXEC, F_SEAL_EXEC, F_SEAL_EXEC | SEALS_OF_SIZE,
                        F_SEAL_EXEC | SEALS_OF_SIZE | F_SEAL_SEAL]

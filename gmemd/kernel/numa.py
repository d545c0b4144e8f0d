"""NUMA policies: of a file through a mapping (mbind), of a thread (set_mempolicy)."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.rules import refuse

_MODES = {"default": uapi.MPOL_DEFAULT, "preferred": uapi.MPOL_PREFERRED, "bind": uapi.MPOL_BIND,
          "interleave": uapi.MPOL_INTERLEAVE}


def _mode(policy: str, nodes: Sequence[int]) -> int:
    """The kernel's number; several preferred nodes need their own mode (Linux 5.15)."""
    if any(node < 0 for node in nodes):
        raise refuse(errno.EINVAL)
    if policy == "preferred" and len(nodes) > 1:
        return uapi.MPOL_PREFERRED_MANY
    return _MODES[policy]


def set_policy(fd: int, size: int, policy: str, nodes: Sequence[int]) -> None:
    """Set the policy for the file's future pages; EINVAL when none of the nodes is online.

    A kernel built without NUMA has one node and only the default policy, which needs no call.
    """
    mode = _mode(policy, nodes)
    try:
        with syscalls.mapped(size, uapi.PROT_NONE, uapi.MAP_SHARED | uapi.MAP_NORESERVE, fd) as address:
            syscalls.mbind(address, size, mode, nodes)
    except OSError as exc:
        if exc.errno != errno.ENOSYS or policy != "default":
            raise


@contextmanager
def policy_for_thread(policy: str, nodes: Sequence[int]) -> Iterator[None]:
    """Place what the calling thread allocates in the block; afterwards its policy is restored."""
    mode = _mode(policy, nodes)
    before = syscalls.get_mempolicy()
    syscalls.set_mempolicy(mode, nodes)
    try:
        yield
    finally:
        syscalls.set_mempolicy(*before)

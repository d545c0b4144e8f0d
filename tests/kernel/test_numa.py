"""NUMA policies of files and threads."""

from __future__ import annotations

import errno
import os

import pytest

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel.host import errno_of, hugepage_size, mapped, online_nodes

OFFLINE = 1023  # far above any node of a test's machine


POLICIES = ("default", "preferred", "bind", "interleave")  # by their numbers


@pytest.mark.parametrize("policy", POLICIES)
def test_a_memfd_keeps_its_policy(kernel: Kernel, policy: str) -> None:
    """What was set through one mapping is seen through the next."""
    node = online_nodes()[-1]
    nodes = [] if policy == "default" else [node]
    fd = kernel.memfd_create("ordinary", 0)
    try:
        kernel.truncate(fd, 4 * PAGE_SIZE)
        kernel.set_policy(fd, 4 * PAGE_SIZE, policy, nodes)
        with mapped(fd, PAGE_SIZE, 3 * PAGE_SIZE) as address:
            assert syscalls.get_mempolicy(address) == (POLICIES.index(policy), nodes)
    finally:
        os.close(fd)


def test_several_preferred_nodes_have_their_own_mode(kernel: Kernel) -> None:
    """One node: MPOL_PREFERRED; more: MPOL_PREFERRED_MANY, of which the offline ones drop out."""
    node = online_nodes()[-1]
    fd = kernel.memfd_create("ordinary", 0)
    try:
        kernel.truncate(fd, PAGE_SIZE)
        kernel.set_policy(fd, PAGE_SIZE, "preferred", [node, OFFLINE])
        with mapped(fd, PAGE_SIZE) as address:
            assert syscalls.get_mempolicy(address) == (uapi.MPOL_PREFERRED_MANY, [node])
    finally:
        os.close(fd)


@pytest.mark.parametrize("policy", ["preferred", "bind", "interleave"])
@pytest.mark.parametrize("nodes", [[OFFLINE], [65535], [-1], []])
def test_no_online_node_is_einval(kernel: Kernel, policy: str, nodes: list[int]) -> None:
    """Whether it is offline, beyond what any kernel has, or no node at all."""
    fd = kernel.memfd_create("ordinary", 0)
    try:
        kernel.truncate(fd, PAGE_SIZE)
        code = errno_of(kernel.set_policy, fd, PAGE_SIZE, policy, nodes)
        if policy == "preferred" and nodes == []:
            assert code == 0  # to the kernel this is local allocation; the backend refuses it before
        else:
            assert code == errno.EINVAL
    finally:
        os.close(fd)


def test_the_default_has_no_nodes(kernel: Kernel) -> None:
    """A default policy with nodes is EINVAL."""
    fd = kernel.memfd_create("ordinary", 0)
    kernel.truncate(fd, PAGE_SIZE)
    code = errno_of(kernel.set_policy, fd, PAGE_SIZE, "default", [0])
    os.close(fd)
    assert code == errno.EINVAL


def test_a_threads_policy_ends_with_the_block(kernel: Kernel) -> None:
    """Also when the block raises, and when the thread had one before."""
    outer = (uapi.MPOL_INTERLEAVE, online_nodes()[-1:])
    with kernel.policy_for_thread("interleave", outer[1]):
        with pytest.raises(ZeroDivisionError), kernel.policy_for_thread("bind", outer[1]):
            raise ZeroDivisionError
        assert syscalls.get_mempolicy() == outer
    assert syscalls.get_mempolicy() == (uapi.MPOL_DEFAULT, [])


def test_a_guest_memfd_takes_a_policy(kernel: Kernel) -> None:
    """On every kernel the call succeeds; where the file does not keep it, populate places the pages."""
    fd = kernel.create_guest_memfd(PAGE_SIZE, 3)
    kernel.set_policy(fd, PAGE_SIZE, "bind", online_nodes()[-1:])
    code = errno_of(kernel.set_policy, fd, PAGE_SIZE, "bind", [OFFLINE])
    os.close(fd)
    assert code == errno.EINVAL


def test_huge_pages_take_a_policy_before_any_is_reserved(kernel: Kernel) -> None:
    """The mapping that carries it reserves nothing."""
    fd = kernel.memfd_create("huge", uapi.MFD_HUGETLB)
    try:
        kernel.truncate(fd, 4 * hugepage_size())
        kernel.set_policy(fd, 4 * hugepage_size(), "bind", online_nodes()[-1:])
        assert kernel.resident(fd) == 0
    finally:
        os.close(fd)

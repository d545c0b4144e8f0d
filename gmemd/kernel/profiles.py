"""What each kernel that can be simulated offers: one table a profile, and nothing but tables.

A profile says what a client or `gmemctl doctor` sees. Sources: the reference page on guest_memfd, sections
2 to 4 and 9. What no release has (in-place, no-direct-map) follows the patch series as posted.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final, NamedTuple

from gmemd.kernel import uapi
from gmemd.kernel.uapi import GUEST_MEMFD_SHARED

DEFAULT: Final = "6.18"


class Errnos(NamedTuple):
    """The errno of each refusal that depends on the kernel's version, or that names a rule."""

    create: int = errno.EINVAL  # an illegal size or flag
    absent: int = errno.ENOTTY  # KVM_CREATE_GUEST_MEMFD on a kernel without guest_memfd
    map_without_flag: int = errno.ENODEV  # mmap of a file made without MMAP
    map_private: int = errno.EINVAL  # MAP_PRIVATE of a file made with MMAP
    convert: int | None = errno.ENOTTY  # the conversion ioctl; None: it works
    overlap: int = errno.EINVAL  # binding a range of the file twice (EEXIST from 7.2)
    user_copy: int | None = None  # system calls on the memory of a file made with NO_DIRECT_MAP


class Profile(NamedTuple):
    """One kernel as its users see it."""

    name: str
    says: str  # what is special, for people
    guest_memfd_flags: int | None  # mask of the legal creation flags; None: no guest_memfd
    capabilities: Mapping[str, int]  # KVM_CAP_*: what KVM_CHECK_EXTENSION answers on a VM of the default type
    magic: int = uapi.ANON_INODE_FS_MAGIC  # statfs
    link: str = "anon_inode:[kvm-gmem]"  # readlink of /proc/PID/fd/N
    shared_policy: bool = False  # mbind stores the policy in the file
    errnos: Errnos = Errnos()

    @property
    def conversion(self) -> bool:
        """Pages of a file can be converted between private and shared."""
        return self.errnos.convert is None


def _capabilities(guest_memfd: int, flags: int) -> dict[str, int]:
    return {
        "USER_MEMORY2": 1,
        "MEMORY_ATTRIBUTES": 0,
        "GUEST_MEMFD": guest_memfd,
        "VM_TYPES": 1,
        "PRE_FAULT_MEMORY": 0,
        "GUEST_MEMFD_FLAGS": flags,
    }


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(
            name="6.17",
            says="guest_memfd without flags: it can be made, not mapped",
            guest_memfd_flags=0,
            capabilities=_capabilities(1, 0),
        ),
        Profile(
            name="6.18",
            says="flags MMAP and INITGUEST_MEMFD_SHARED",
            guest_memfd_flags=GUEST_MEMFD_SHARED,
            capabilities=_capabilities(1, GUEST_MEMFD_SHARED),
        ),
        Profile(
            name="6.19",
            says="the file keeps its NUMA policy; its own file system",
            guest_memfd_flags=GUEST_MEMFD_SHARED,
            capabilities=_capabilities(1, GUEST_MEMFD_SHARED),
            magic=uapi.GUEST_MEMFD_MAGIC,
            link="/[kvm-gmem] (deleted)",
            shared_policy=True,
        ),
        Profile(
            name="in-place",
            says="pages can be converted in place between private and shared (not released)",
            guest_memfd_flags=GUEST_MEMFD_SHARED,
            capabilities=_capabilities(1, GUEST_MEMFD_SHARED),
            magic=uapi.GUEST_MEMFD_MAGIC,
            link="/[kvm-gmem] (deleted)",
            shared_policy=True,
            errnos=Errnos(convert=None, overlap=errno.EEXIST),
        ),
        Profile(
            name="no-guest-memfd",
            says="KVM without guest_memfd (before 6.8)",
            guest_memfd_flags=None,
            capabilities=_capabilities(0, 0),
        ),
        Profile(
            name="no-direct-map",
            says="the proposed flag NO_DIRECT_MAP is accepted (not released)",
            guest_memfd_flags=GUEST_MEMFD_SHARED | uapi.GUEST_MEMFD_FLAG_NO_DIRECT_MAP,
            capabilities=_capabilities(1, GUEST_MEMFD_SHARED | uapi.GUEST_MEMFD_FLAG_NO_DIRECT_MAP),
            magic=uapi.GUEST_MEMFD_MAGIC,
            link="/[kvm-gmem] (deleted)",
            shared_policy=True,
            errnos=Errnos(overlap=errno.EEXIST, user_copy=errno.EFAULT),
        ),
    )
}

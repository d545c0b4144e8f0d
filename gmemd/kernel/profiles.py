"""What each kernel that can be simulated offers: one table per profile, and nothing but tables.

A profile describes what a client or `gmemctl doctor` sees, on a host with nested paging. Those of releases hold what
such kernels answered when they were asked (tests/kernel/recorded); what no release has (in-place, no-direct-map)
follows the patch series as posted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from gmemd.kernel.uapi import ANON_INODE_FS_MAGIC, GUEST_MEMFD_FLAG_NO_DIRECT_MAP, GUEST_MEMFD_MAGIC, GUEST_MEMFD_SHARED

DEFAULT: Final = "6.18"


class Profile(NamedTuple):
    """One kernel, as its users see it."""

    guest_memfd_flags: int | None  # mask of the legal creation flags; None: no guest_memfd
    for_default_vm: bool = True  # a VM of the default type says that it has guest_memfd, and can be given one
    magic: int = ANON_INODE_FS_MAGIC  # statfs
    link: str = "anon_inode:[kvm-gmem]"  # readlink of /proc/PID/fd/N
    shared_policy: bool = False  # mbind stores the policy in the file
    bind_twice: str = "EINVAL"  # the errno of binding what is bound already
    conversion: bool = False  # pages of a file can be converted between private and shared

    @property
    def capabilities(self) -> dict[str, int]:
        """KVM_CAP_*: what KVM_CHECK_EXTENSION returns on a VM of the default type."""
        exists = self.guest_memfd_flags is not None
        return {"USER_MEMORY2": 1, "MEMORY_ATTRIBUTES": 0, "GUEST_MEMFD": int(exists and self.for_default_vm),
                "VM_TYPES": 1, "PRE_FAULT_MEMORY": int(exists), "GUEST_MEMFD_FLAGS": self.guest_memfd_flags or 0}


_IN_6_18 = Profile(GUEST_MEMFD_SHARED)
# guest_memfd has its own file system, and the file a NUMA policy (both since Linux 6.19)
_IN_7_2 = Profile(GUEST_MEMFD_SHARED, magic=GUEST_MEMFD_MAGIC, link="/[kvm-gmem] (deleted)", shared_policy=True,
                  bind_twice="EEXIST")

PROFILES: Final[Mapping[str, Profile]] = {
    "6.12": Profile(0, for_default_vm=False),  # it can be created, but not mapped
    "6.18": _IN_6_18,
    "7.2": _IN_7_2,
    "7.3": _IN_7_2,  # differs in userfaultfd only
    "in-place": _IN_7_2._replace(conversion=True),
    "no-guest-memfd": Profile(None),  # before 6.8
    "no-direct-map": _IN_7_2._replace(guest_memfd_flags=GUEST_MEMFD_SHARED | GUEST_MEMFD_FLAG_NO_DIRECT_MAP),
}

"""What each kernel that can be simulated offers: one table per profile, and nothing but tables.

A profile describes what a client or `gmemctl doctor` sees. Sources: the reference page on guest_memfd, sections
2 to 4 and 9. What no release has (in-place, no-direct-map) follows the patch series as posted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from gmemd.kernel.uapi import ANON_INODE_FS_MAGIC, GUEST_MEMFD_FLAG_NO_DIRECT_MAP, GUEST_MEMFD_MAGIC, GUEST_MEMFD_SHARED

DEFAULT: Final = "6.18"


class Profile(NamedTuple):
    """One kernel, as its users see it."""

    guest_memfd_flags: int | None  # mask of the legal creation flags; None: no guest_memfd
    magic: int = ANON_INODE_FS_MAGIC  # statfs
    link: str = "anon_inode:[kvm-gmem]"  # readlink of /proc/PID/fd/N
    shared_policy: bool = False  # mbind stores the policy in the file
    conversion: bool = False  # pages of a file can be converted between private and shared

    @property
    def capabilities(self) -> dict[str, int]:
        """KVM_CAP_*: what KVM_CHECK_EXTENSION returns on a VM of the default type."""
        return {"USER_MEMORY2": 1, "MEMORY_ATTRIBUTES": 0, "GUEST_MEMFD": int(self.guest_memfd_flags is not None),
                "VM_TYPES": 1, "PRE_FAULT_MEMORY": 0, "GUEST_MEMFD_FLAGS": self.guest_memfd_flags or 0}


# Since Linux 6.19 guest_memfd has its own file system, and the file has a NUMA policy.
_IN_6_19 = Profile(GUEST_MEMFD_SHARED, GUEST_MEMFD_MAGIC, "/[kvm-gmem] (deleted)", shared_policy=True)

PROFILES: Final[Mapping[str, Profile]] = {
    "6.17": Profile(0),  # it can be created, but not mapped
    "6.18": Profile(GUEST_MEMFD_SHARED),
    "6.19": _IN_6_19,
    "in-place": _IN_6_19._replace(conversion=True),
    "no-guest-memfd": Profile(None),  # before 6.8
    "no-direct-map": _IN_6_19._replace(guest_memfd_flags=GUEST_MEMFD_SHARED | GUEST_MEMFD_FLAG_NO_DIRECT_MAP),
}

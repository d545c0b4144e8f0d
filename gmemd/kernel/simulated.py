"""Simulated guest_memfd, for hosts without KVM or a new enough kernel: the same rules on sealed memfds.

Everything else (memfds, files, huge pages, allocation, residency) is real. The rules apply to everything that goes
through gmemd; what a holder of the fd can do beyond them is listed in docs/kernel.md.
"""

from __future__ import annotations

import errno
import os

from gmemd.kernel import standin, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.probe import attempt
from gmemd.kernel.profiles import DEFAULT, PROFILES, Profile
from gmemd.kernel.rules import PAGE_SIZE, refuse


class SimulatedKernel(Kernel):
    """guest_memfd as a profile describes it."""

    name = "simulated"
    simulated = True
    guest_counter = "Shmem"
    kvm_enabled = False

    def __init__(self, profile: Profile = PROFILES[DEFAULT], *, why: str = "it was asked for") -> None:
        self.why = why
        self.profile = profile
        self.kvm_present = os.path.exists("/dev/kvm")
        self.guest_memfd_flags = profile.guest_memfd_flags
        self.shared_policy = profile.shared_policy
        self.conversion = profile.conversion

    def create_guest_memfd(self, size: int, flags: int) -> int:
        legal = self.guest_memfd_flags
        if legal is None:
            raise refuse(errno.ENOTTY)
        if flags & ~legal or flags < 0 or not 0 < size <= uapi.OFFSET_MAX or size % PAGE_SIZE:
            raise refuse(errno.EINVAL)
        return standin.create(size, flags)

    def check_mapping(self, fd: int, *, shared: bool) -> None:
        flags = standin.flags_of(fd)
        if flags is not None and not flags & uapi.GUEST_MEMFD_FLAG_MMAP:
            raise refuse(errno.ENODEV)
        if flags is not None and not shared:
            raise refuse(errno.EINVAL)

    def probe(self) -> dict[str, int | str]:
        profile = self.profile
        found: dict[str, int | str] = {**profile.capabilities, **attempt(self)}
        if self.guest_memfd_flags is not None:
            found["link"] = profile.link
            found["magic"] = f"0x{profile.magic:08x}"
            found["policy"] = self._policy()
            found["bind twice"] = profile.bind_twice
            found["convert"] = "OK" if profile.conversion else "ENOTTY"
        return found

    def _policy(self) -> str:
        if not self.profile.guest_memfd_flags:
            return "ENODEV"  # it is set through a mapping
        return "file" if self.shared_policy else "mapping"

    def close(self) -> None:
        """It has no fds."""

"""The one place that decides which kernel makes the memory."""

from __future__ import annotations

from ..errors import QmpError
from .base import Kernel
from .linux import LinuxKernel, Unsupported
from .profiles import DEFAULT, PROFILES
from .simulated import SimulatedKernel


def choose_kernel(name: str, *, device: str = "/dev/kvm") -> Kernel:
    """Return the kernel for `auto`, `kvm` or `simulated[:PROFILE]`; `why` says why. Call it after any fork.

    `kvm` on a host that cannot: QmpError in QEMU's words, with the reason as its __cause__. `auto` then
    simulates.
    """
    kind, colon, profile = name.partition(":")
    if kind == "simulated":
        return _simulated(profile if colon else DEFAULT, "it was asked for")
    if colon or kind not in ("auto", "kvm"):
        raise QmpError(f"'{name}' is no kernel: 'auto', 'kvm' or 'simulated[:PROFILE]'")
    try:
        return LinuxKernel(device)
    except Unsupported as exc:
        if kind == "kvm":
            raise QmpError("KVM does not support guest_memfd") from exc
        return _simulated(DEFAULT, str(exc))


def _simulated(profile: str, why: str) -> Kernel:
    if profile not in PROFILES:
        names = ", ".join(f"'{known}'" for known in PROFILES)
        raise QmpError(f"'{profile}' is no profile of the simulated kernel: {names}")
    return SimulatedKernel(PROFILES[profile], why=why)

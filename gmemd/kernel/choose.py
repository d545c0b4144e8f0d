"""The one place that decides which kernel provides the memory."""

from __future__ import annotations

from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.linux import LinuxKernel, Unsupported


def choose_kernel(name: str, *, device: str = "/dev/kvm") -> Kernel:
    """The kernel for `auto`, `kvm` or `simulated[:PROFILE]`; `why` says why. Call it after any fork.

    `kvm` on a host without support: QmpError in QEMU's words, with the reason as its __cause__. `auto` then simulates.
    """
    kind, colon, profile = name.partition(":")
    if kind == "simulated":
        return _simulated(profile if colon else None, "it was asked for")
    if colon or kind not in ("auto", "kvm"):
        raise QmpError(f"unknown kernel '{name}': 'auto', 'kvm' or 'simulated[:PROFILE]'")
    try:
        return LinuxKernel(device)
    except Unsupported as exc:
        if kind == "kvm":
            raise QmpError("KVM does not support guest_memfd") from exc
        return _simulated(None, str(exc))


def _simulated(profile: str | None, why: str) -> Kernel:
    """The simulation of a profile, or of the default one."""
    from gmemd.kernel.profiles import DEFAULT, PROFILES  # imported only here: most hosts need no simulation
    from gmemd.kernel.simulated import SimulatedKernel

    profile = DEFAULT if profile is None else profile
    if profile not in PROFILES:
        names = ", ".join(f"'{known}'" for known in PROFILES)
        raise QmpError(f"unknown profile '{profile}' of the simulated kernel: {names}")
    return SimulatedKernel(PROFILES[profile], why=why)

"""Which kernel is chosen, and the reason in words."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.linux import LinuxKernel, Unsupported, why_not_opened, why_not_shared
from tests.kernel.host import fds


def reason(path: Path | str) -> str:
    """Return why a device cannot be used."""
    with pytest.raises(Unsupported) as refused:
        LinuxKernel(str(path))
    return str(refused.value)


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    """The reason says which device, and `auto` carries it on."""
    path = tmp_path / "kvm"
    assert reason(path) == f"no {path}"
    kernel = choose_kernel("auto", device=str(path))
    assert (kernel.name, kernel.why) == ("simulated", f"no {path}")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOENT, "no /dev/kvm"),
        (errno.ENXIO, "no KVM behind /dev/kvm"),
        (errno.ENODEV, "no KVM behind /dev/kvm"),
        (errno.EACCES, "no permission on /dev/kvm"),
        (errno.EPERM, "no permission on /dev/kvm"),
        (errno.EMFILE, "/dev/kvm: Too many open files"),
    ],
)
def test_each_failure_to_open_has_its_words(code: int, expected: str) -> None:
    """An operator reads what to do, not a number."""
    assert why_not_opened("/dev/kvm", code) == expected


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        (0, 0, "kernel without guest_memfd (Linux 6.8 has it)"),
        (1, 0, "guest_memfd lacks the flag MMAP (Linux 6.18 has it)"),
        (1, 1, "guest_memfd lacks the flag INIT_SHARED (Linux 6.18 has it)"),
        (1, 3, None),
        (1, 7, None),
    ],
)
def test_each_lack_of_kvm_has_its_words(capability: int, flags: int, expected: str | None) -> None:
    """Capability 234 and the mask of capability 244 decide; flags to come do no harm."""
    assert why_not_shared(capability, flags) == expected


def test_what_is_not_kvm_is_said(tmp_path: Path) -> None:
    """A file and another device are not KVM; nothing stays open."""
    before = fds()
    path = tmp_path / "kvm"
    path.touch()
    assert reason(path) == "the device is not KVM"
    assert reason("/dev/null") == "the device is not KVM"
    assert fds() == before


AS_NOBODY = """
import os, sys
from gmemd.kernel.choose import choose_kernel
os.setgroups([]), os.setgid(65534), os.setuid(65534)
kernel = choose_kernel("auto", device=sys.argv[1])
print(kernel.name, "|", kernel.why, flush=True)
os._exit(0)  # at exit a measurement of coverage would want to write a file of its own
"""


def test_a_missing_permission_is_said(tmp_path: Path) -> None:
    """An ordinary user without access gets the simulation, and is told."""
    if os.getuid() != 0:
        pytest.skip("needs root, to become another user")
    path = Path("/dev/shm") / f"gmemd-test-{os.getpid()}"
    path.touch(mode=0o600)
    try:
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, path], capture_output=True, text=True)
    finally:
        path.unlink()
    assert done.stderr == ""
    assert done.stdout == f"simulated | no permission on {path}\n"


def test_kvm_that_cannot_is_refused_in_qemus_words(tmp_path: Path) -> None:
    """The client gets QEMU's sentence; the reason is its cause, for the log."""
    path = tmp_path / "kvm"
    with pytest.raises(QmpError) as refused:
        choose_kernel("kvm", device=str(path))
    assert refused.value.desc == "KVM does not support guest_memfd"
    assert str(refused.value.__cause__) == f"no {path}"


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["kvm", "auto"])
def test_kvm_is_chosen_where_it_works(name: str) -> None:
    """A page was really made and used; the kernel says so."""
    before = fds()
    kernel = choose_kernel(name)
    seen = (kernel.name, kernel.kvm_present, kernel.kvm_enabled, kernel.simulated)
    why = kernel.why
    kernel.close()
    kernel.close()  # a second time does nothing
    assert seen == ("kvm", True, True, False)
    assert why == "a shared guest_memfd was created, mapped, written, punched and measured"
    assert fds() == before


@pytest.mark.kvm
def test_a_forked_child_cannot_use_the_vm() -> None:
    """So the kernel is made after any fork: in another process every VM ioctl is EIO."""
    with closing(LinuxKernel()) as kernel:
        child = os.fork()
        if child == 0:
            try:
                kernel.create_guest_memfd(1 << 20, 3)
            except OSError as exc:
                os._exit(exc.errno or 0)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 5  # EIO


def test_the_simulation_has_profiles() -> None:
    """6.18 unless another is named."""
    default, named = choose_kernel("simulated"), choose_kernel("simulated:6.12")
    assert (default.guest_memfd_flags, named.guest_memfd_flags) == (3, 0)
    assert (default.name, default.why, default.kvm_enabled) == ("simulated", "it was asked for", False)


@pytest.mark.parametrize("name", ["", "KVM", "kvm:6.18", "auto:", "qemu", "simulated:", "simulated:9.9"])
def test_unknown_names_are_refused(name: str) -> None:
    """The error lists the choices."""
    with pytest.raises(QmpError) as refused:
        choose_kernel(name)
    assert ("'simulated[:PROFILE]'" in refused.value.desc) or ("'no-direct-map'" in refused.value.desc)

"""Real guest_memfd: one long-lived VM of this process, on which every guest_memfd is created.

VM ioctls work only in the process that created the VM (EIO after a fork), so create a LinuxKernel after any fork. A
guest_memfd pins its VM, not the reverse: it lives on with its holders (reference, sections 1 and 5).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from struct import Struct, unpack_from

from gmemd.kernel import numa, residency, syscalls, uapi
from gmemd.kernel.kernel import Kernel, PageInUse
from gmemd.kernel.probe import attempt, name_of, outcome
from gmemd.kernel.rules import PAGE_SIZE, refuse

_pack_create = Struct(uapi.KVM_CREATE_GUEST_MEMFD_FORMAT).pack
_pack_convert = Struct("<16Q").pack  # offset, size, attributes, flags, error_offset (out), reserved[11]
_pack_region = Struct("<IIQQQQII112x").pack  # slot, flags, guest's address, bytes, host's address, offset, fd, pad
_U64 = 1 << 64


class Unsupported(Exception):
    """This host cannot create a shared guest_memfd; the text is the reason, a readable clause."""


class LinuxKernel(Kernel):
    """guest_memfd by KVM. Raises Unsupported when a test page cannot be created and used."""

    name = "kvm"
    simulated = False
    guest_counter = "Unevictable"
    kvm_present = True
    kvm_enabled = True

    device: int  # the fd of /dev/kvm; borrowed, for probing its ioctls
    vm: int  # the VM's fd; likewise

    def __init__(self, path: str = "/dev/kvm") -> None:
        self.device, self.vm = open_vm(path)
        try:
            self.guest_memfd_flags = self._legal_flags()
            self.conversion, self.shared_policy = self._use_one_page()
        except BaseException:
            self.close()
            raise
        self.why = "a shared guest_memfd was created, mapped, written, punched and measured"
        if not residency.can_count():
            self.why += "; its pages count as resident once touched, because the system call cachestat is refused"

    def create_guest_memfd(self, size: int, flags: int) -> int:
        if not (0 <= size < _U64 and 0 <= flags < _U64):
            raise refuse(errno.EINVAL)
        request = bytearray(_pack_create(size, flags))
        fd: int = fcntl.ioctl(self.vm, uapi.KVM_CREATE_GUEST_MEMFD, request, True)
        os.set_inheritable(fd, False)  # the kernel never sets close-on-exec on a new guest_memfd
        return fd

    def convert(self, fd: int, offset: int, size: int, parts: Sequence[tuple[int, int]], *, private: bool) -> None:
        if not self.conversion:
            super().convert(fd, offset, size, parts, private=private)
            return
        attributes = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
        request = bytearray(_pack_convert(offset, size, attributes, *[0] * 13))
        try:
            fcntl.ioctl(fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, request, True)
        except BlockingIOError:
            raise PageInUse(unpack_from("<Q", request, 32)[0]) from None

    def check_mapping(self, fd: int, *, shared: bool) -> None:
        """Nothing: mmap(2) itself refuses."""

    def probe(self) -> dict[str, int | str]:
        from gmemd.kernel.profiles import DEFAULT, PROFILES  # imported only here, for `gmemctl doctor`

        found: dict[str, int | str] = {name: self._extension(name) for name in PROFILES[DEFAULT].capabilities}
        found |= attempt(self)
        fd = self.create_guest_memfd(2 * PAGE_SIZE, (self.guest_memfd_flags or 0) & uapi.GUEST_MEMFD_SHARED)
        try:
            found["link"] = os.readlink(f"/proc/self/fd/{fd}")
            found["magic"] = f"0x{syscalls.filesystem(fd)[0]:08x}"
            found["policy"] = _policy_of(fd)
            found["bind twice"] = self._bind_twice(fd)
            found["convert"] = outcome(lambda: _convert_nothing(fd))
        finally:
            os.close(fd)
        return found

    def _bind_twice(self, fd: int) -> str:
        """How it ends to bind a part of the file that is bound already; afterwards nothing is bound."""

        def bind(slot: int, size: int) -> None:
            fcntl.ioctl(self.vm, uapi.KVM_SET_USER_MEMORY_REGION2,
                        _pack_region(slot, uapi.KVM_MEM_GUEST_MEMFD, slot * 2 * PAGE_SIZE, size, 0, 0, fd, 0))

        first = outcome(lambda: bind(0, 2 * PAGE_SIZE))
        if first != "OK":
            return first
        try:
            return outcome(lambda: bind(1, PAGE_SIZE))
        finally:
            bind(0, 0)

    def _extension(self, name: str, *, of_device: bool = False) -> int:
        """What KVM answers for a KVM_CAP_: of the VM, whose type matters, or of the device."""
        capability: int = getattr(uapi, f"KVM_CAP_{name}")
        return fcntl.ioctl(self.device if of_device else self.vm, uapi.KVM_CHECK_EXTENSION, capability)

    def close(self) -> None:
        for fd in (self.vm, self.device):
            if fd >= 0:
                os.close(fd)
        self.vm = self.device = -1

    def _legal_flags(self) -> int:
        """The mask of creation flags, which depends on the VM's type. Before there were any, so did guest_memfd itself,
        and only the device says whether the kernel has it."""
        flags = self._extension("GUEST_MEMFD_FLAGS")
        reason = why_not_shared(self._extension("GUEST_MEMFD", of_device=True), flags)
        if reason is not None:
            raise Unsupported(reason)
        return flags

    def _use_one_page(self) -> tuple[bool, bool]:
        """Allocate, map, write, punch, read and measure a page; return whether it converts and has a policy."""
        step = "created"
        try:
            fd = self.create_guest_memfd(PAGE_SIZE, uapi.GUEST_MEMFD_SHARED)
            try:
                step = "mapped and written"
                with mmap.mmap(fd, PAGE_SIZE) as page:
                    page.madvise(uapi.MADV_POPULATE_WRITE)  # EFAULT here would be SIGBUS on access
                    page[0] = 1
                    step = "punched"
                    self.punch_hole(fd, 0, PAGE_SIZE)
                    if page[0]:
                        raise Unsupported("a punched page of guest_memfd does not read as zeros")
                step = "measured"
                if residency.resident(fd) != PAGE_SIZE:
                    raise Unsupported("the pages of guest_memfd are not counted")
                converts = outcome(lambda: _convert_nothing(fd)) != "ENOTTY"
                return converts, syscalls.filesystem(fd)[0] == uapi.GUEST_MEMFD_MAGIC
            finally:
                os.close(fd)
        except OSError as exc:
            raise Unsupported(f"guest_memfd cannot be {step}: {exc.strerror}") from exc


def why_not_opened(path: str, code: int) -> str:
    """The reason for an errno of opening the device."""
    if code == errno.ENOENT:
        return f"no {path}"
    if code in (errno.ENXIO, errno.ENODEV):
        return f"no KVM behind {path}"
    if code in (errno.EACCES, errno.EPERM):
        return f"no permission on {path}"
    return f"{path}: {os.strerror(code)}"


def why_not_shared(capability: int, flags: int) -> str | None:
    """Why others could not use a guest_memfd, by KVM_CAP_GUEST_MEMFD of the device and _FLAGS; None: they can."""
    if not capability:
        return "kernel without guest_memfd (Linux 6.8 has it)"
    if not flags & uapi.GUEST_MEMFD_FLAG_MMAP:
        return "guest_memfd lacks the flag MMAP (Linux 6.18 has it)"
    if not flags & uapi.GUEST_MEMFD_FLAG_INIT_SHARED:
        return "guest_memfd lacks the flag INIT_SHARED (Linux 6.18 has it)"
    return None


def open_vm(path: str) -> tuple[int, int]:
    """(kvm fd, VM fd), both close-on-exec; the caller owns them."""
    try:
        kvm = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise Unsupported(why_not_opened(path, exc.errno or 0)) from exc
    try:
        return kvm, _create_vm(kvm)
    except BaseException:
        os.close(kvm)
        raise


def _create_vm(kvm: int) -> int:
    try:
        version = fcntl.ioctl(kvm, uapi.KVM_GET_API_VERSION)
    except OSError as exc:
        raise Unsupported("the device is not KVM") from exc
    if version != uapi.KVM_API_VERSION:
        raise Unsupported(f"KVM has API version {version}, not {uapi.KVM_API_VERSION}")
    while True:
        try:
            return fcntl.ioctl(kvm, uapi.KVM_CREATE_VM, _vm_type(kvm))
        except InterruptedError:  # fcntl.ioctl does not retry
            continue
        except OSError as exc:
            raise Unsupported(f"KVM cannot create a VM: {exc.strerror}") from exc


def _vm_type(kvm: int) -> int:
    """The default type; on arm64 that is the number of address bits, 40 unless the host has fewer."""
    if os.uname().machine != "aarch64":
        return 0
    return fcntl.ioctl(kvm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_ARM_VM_IPA_SIZE)


def _convert_nothing(fd: int) -> None:
    """Show whether the proposed conversion ioctl exists: a request of zeros does nothing."""
    fcntl.ioctl(fd, uapi.KVM_SET_MEMORY_ATTRIBUTES2, bytearray(uapi.KVM_SET_MEMORY_ATTRIBUTES2_SIZE), True)


def _policy_of(fd: int) -> str:
    """Whose a NUMA policy is that one mapping sets: "file" or "mapping"; or why it cannot be set."""
    try:
        with syscalls.mapped(PAGE_SIZE, uapi.PROT_NONE, uapi.MAP_SHARED, fd) as address:
            numa.set_policy(fd, PAGE_SIZE, "preferred", [])
            return "mapping" if syscalls.get_mempolicy(address)[0] == uapi.MPOL_DEFAULT else "file"
    except OSError as exc:
        return name_of(exc)

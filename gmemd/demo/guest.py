"""The smallest VMM: it runs a guest of three instructions on memory that another process owns.

    gmemctl exec gm0 -- python3 examples/guest.py --offset {gm0.offset} --size {gm0.size} {gm0}
    python3 examples/guest.py --rounds 100 /proc/self/fd/7

The argument names an inherited descriptor of a guest_memfd, a memfd or a file.
An object that is part of a file begins at an offset: what lies before it belongs to another guest.
The guest counts in its memory at 0x2000, forever or for `--rounds`; its code is there too, at 0x1000. So a second
process that gets the same memory finds both and goes on counting. Where /dev/kvm may be used and the machine is x86-64,
a real vCPU in real mode runs the guest.
Elsewhere this process does the guest's work itself, and says so.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import mmap
import os
import platform
import struct
import time

CODE, COUNTER = 0x1000, 0x2000  # guest-physical addresses
PROGRAM = bytes.fromhex(
    "66ff060020"  # again: inc dword [0x2000]
    "e610"        #        out 0x10, al         leaves the guest, so that the VMM can look
    "ebf7"        #        jmp again
)

# include/uapi/linux/kvm.h, x86-64
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_EXIT_IO = 2


class Vcpu:
    """A KVM virtual machine of this process with one vCPU, its memory the mapping from address 0 on."""

    name = "a real KVM vCPU"

    def __init__(self, memory: mmap.mmap) -> None:
        """Raise OSError where KVM may not be used."""
        if platform.machine() != "x86_64":
            raise OSError(0, "the guest is x86 code")
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        fcntl.ioctl(vm, KVM_SET_TSS_ADDR, 0x7FFBD000)  # old Intel CPUs need three unused pages for real mode
        # An ordinary slot: a guest_memfd belongs to the VM it was created on; others use its mapping.
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, len(memory), address))
        self._vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
        self._run = mmap.mmap(self._vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
        sregs = bytearray(312)
        fcntl.ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        struct.pack_into("<Q", sregs, 0, 0)   # cs.base, 0xffff0000 after reset
        struct.pack_into("<H", sregs, 12, 0)  # cs.selector
        fcntl.ioctl(self._vcpu, KVM_SET_SREGS, bytes(sregs))
        # rax ... r15 are 0, then rip and rflags (bit 1 is always set)
        fcntl.ioctl(self._vcpu, KVM_SET_REGS, struct.pack("<18Q", *[0] * 16, CODE, 2))

    def round(self) -> None:
        """Let the guest count once."""
        while True:
            try:
                fcntl.ioctl(self._vcpu, KVM_RUN, 0)
            except InterruptedError:  # a signal
                continue
            break
        reason = struct.unpack_from("<I", self._run, 8)[0]
        if reason != KVM_EXIT_IO:
            raise SystemExit(f"guest: unexpected exit {reason}")


class Plain:
    """The guest's work, done without a guest."""

    def __init__(self, memory: mmap.mmap, reason: OSError) -> None:
        self.name = f"no vCPU ({reason.strerror}), but a plain process"
        self._memory = memory

    def round(self) -> None:
        struct.pack_into("<I", self._memory, COUNTER, counter(self._memory) + 1)


def counter(memory: mmap.mmap) -> int:
    """How far the guest has counted."""
    return int(struct.unpack_from("<I", memory, COUNTER)[0])


def map_memory(fd: int, offset: int = 0, size: int = 0) -> mmap.mmap:
    """Map as much of the memory as real mode can address, shared; size 0 is to the end of the file."""
    return mmap.mmap(fd, min(size or os.fstat(fd).st_size - offset, 1 << 20), offset=offset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=0, help="end after so many (default: never)")
    parser.add_argument("--offset", type=int, default=0, help="where in the file the memory begins")
    parser.add_argument("--size", type=int, default=0, help="how many bytes it has (default: to the end)")
    parser.add_argument("memory", help="/proc/self/fd/N, or just N")
    options = parser.parse_args()

    # A guest_memfd cannot be opened by this path (ENXIO): use the inherited descriptor itself.
    memory = map_memory(int(options.memory.rpartition("/")[2]), options.offset, options.size)
    found = memory[CODE:CODE + len(PROGRAM)] == PROGRAM
    if not found:
        memory[CODE:CODE + len(PROGRAM)] = PROGRAM
    guest: Vcpu | Plain
    try:
        guest = Vcpu(memory)
    except OSError as exc:
        guest = Plain(memory, exc)
    where = "found in" if found else "loaded into"
    print(f"{guest.name}; guest {where} the memory, counter {counter(memory)}", flush=True)
    rounds = 0
    while not options.rounds or rounds < options.rounds:
        guest.round()
        rounds += 1
        if not options.rounds:
            time.sleep(0.001)  # leave the CPU to others
    print(f"counter {counter(memory)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()

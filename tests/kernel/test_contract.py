"""The checklist of the kernel's own selftests, items 1 to 69 of the guest_memfd reference, over both kernels.

Each test names its items. What a kernel cannot show is in ELSEWHERE with the reason; one test holds that each
item is tested or listed for each kernel. Operations go through the Kernel; with `kvm` the bare system call is
made, too, and must agree. What is mapped here is mapped as any holder of the fd would.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from gmemd.kernel import syscalls, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.linux import LinuxKernel
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel import host
from tests.kernel.host import errno_of, look, mapped, read_page, signal_of, write_page
from tests.kernel.slots import DATA, run_guest

MMAP = uapi.GUEST_MEMFD_FLAG_MMAP
SHARED = MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
KEEP = uapi.FALLOC_FL_KEEP_SIZE
PUNCH = uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE
PMD = 2 << 20

Make = Callable[..., int]

_ITEMS: dict[int, set[str]] = {}  # item -> kernels that have a test of it
_BOTH = ("kvm", "simulated")

# item -> kernel -> why it is not shown there. docs/kernel.md tells the same to users.
_HOLDER = "rules of the descriptor: a holder of a memfd may do this, and gmemd itself has no such operation"
_NO_FAULT = (
    "a memfd has no private pages: no touch of a holder that does not cooperate can be made to fault"
    " (tests/commands/test_enforce.py shows one that does)"
)
_NO_VM = "a memfd cannot be bound to a memslot, only mapped"
_NO_CONVERSION = "no kernel converts pages for a VM of the default type; the ioctl is ENOTTY"
_LATER = "pages become private and shared in the layer above: tests/commands/test_checklist.py shows them there"
ELSEWHERE: dict[int, dict[str, str]] = {
    **{item: {"simulated": _HOLDER} for item in range(10, 14)},
    17: {"simulated": _NO_FAULT},
    18: {"simulated": _NO_FAULT},
    28: {"simulated": "a memfd may collapse into a huge page, which its contents do not show"},
    **{item: {"simulated": _NO_VM} for item in range(42, 62)},
    **{item: {"kvm": _NO_CONVERSION, "simulated": _LATER} for item in range(62, 70)},
}


def item(*numbers: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test shows these items of the checklist, on every kernel that is not listed in ELSEWHERE."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        kernels = [name for name in _BOTH if not any(name in ELSEWHERE.get(n, {}) for n in numbers)]
        for number in numbers:
            _ITEMS.setdefault(number, set()).update(kernels)
        marked = [pytest.param(name, marks=pytest.mark.kvm if name == "kvm" else ()) for name in kernels]
        marked_test: Callable[..., None] = pytest.mark.parametrize("kernel", marked, indirect=True)(test)
        return marked_test

    return mark


each_flavour = pytest.mark.parametrize("flags", [0, MMAP, SHARED])


def test_each_item_is_tested_or_has_its_reason() -> None:
    """Every item has a test or a reason, for each kernel, and not both."""
    for number in range(1, 70):
        tested, listed = _ITEMS.get(number, set()), set(ELSEWHERE.get(number, {}))
        assert set(_BOTH) == tested | listed, number
        assert set() == tested & listed, number


# ---- creation ----------------------------------------------------------------------------------------------


@item(1, 2)
def test_each_legal_flag_alone_is_accepted(kernel: Kernel) -> None:
    """Each bit of the mask makes a file by itself."""
    for bit in (MMAP, uapi.GUEST_MEMFD_FLAG_INIT_SHARED):
        os.close(kernel.create_guest_memfd(PAGE_SIZE, bit))


@item(3)
def test_every_other_flag_is_refused(kernel: Kernel) -> None:
    """Bits 2 to 63 are EINVAL, alone and together with the legal ones."""
    for bit in range(2, 64):
        assert errno_of(kernel.create_guest_memfd, PAGE_SIZE, 1 << bit) == errno.EINVAL
        assert errno_of(kernel.create_guest_memfd, PAGE_SIZE, SHARED | 1 << bit) == errno.EINVAL
    os.close(kernel.create_guest_memfd(PAGE_SIZE, SHARED))


@item(4)
def test_legal_flags_are_mmap_and_init_shared(kernel: Kernel) -> None:
    """The default VM type has both flags and no other."""
    assert kernel.guest_memfd_flags == SHARED


@item(5, 6, 8, 9)
@each_flavour
def test_files_have_their_own_size_and_inode(make: Make, flags: int) -> None:
    """Two files of one VM keep size, inode number and block size apart."""
    one, two = os.fstat(make(PAGE_SIZE, flags)), os.fstat(make(4 * PAGE_SIZE, flags))
    assert (one.st_size, two.st_size) == (PAGE_SIZE, 4 * PAGE_SIZE)
    assert one.st_ino != two.st_ino
    assert PAGE_SIZE == one.st_blksize == two.st_blksize


@item(7)
@each_flavour
def test_sizes_that_are_no_pages_are_refused(kernel: Kernel, flags: int) -> None:
    """Every size within a page is EINVAL, and so are 0, a size too large, and what is not a size."""
    for size in (*range(PAGE_SIZE), PAGE_SIZE + 1, 1 << 63, (1 << 64) - PAGE_SIZE, 1 << 64, -PAGE_SIZE):
        assert errno_of(kernel.create_guest_memfd, size, flags) == errno.EINVAL
    os.close(kernel.create_guest_memfd((1 << 63) - PAGE_SIZE, flags))


# ---- no byte I/O -------------------------------------------------------------------------------------------


@item(10, 11, 12, 13)
@each_flavour
def test_bytes_cannot_be_read_or_written(make: Make, flags: int) -> None:
    """read and write are EINVAL, pread and pwrite ESPIPE."""
    fd = make(PAGE_SIZE, flags)
    assert errno_of(os.read, fd, 1) == errno.EINVAL
    assert errno_of(os.write, fd, b"x") == errno.EINVAL
    assert errno_of(os.pread, fd, 1, 0) == errno.ESPIPE
    assert errno_of(os.pwrite, fd, b"x", 0) == errno.ESPIPE


# ---- mapping -----------------------------------------------------------------------------------------------


@item(14, 15)
def test_without_the_flag_nothing_is_mapped(kernel: Kernel, make: Make) -> None:
    """A file without MMAP is ENODEV, one page of it and the whole."""
    fd = make(4 * PAGE_SIZE, 0)
    for size in (PAGE_SIZE, 4 * PAGE_SIZE):
        assert errno_of(kernel.try_map, fd, size, reserve=True) == errno.ENODEV
        assert errno_of(kernel.try_map, fd, size, reserve=True, shared=False) == errno.ENODEV


@item(16)
@pytest.mark.parametrize("flags", [MMAP, SHARED])
def test_private_mappings_are_refused(kernel: Kernel, make: Make, flags: int) -> None:
    """MAP_PRIVATE is EINVAL where MAP_SHARED does."""
    fd = make(PAGE_SIZE, flags)
    assert errno_of(kernel.try_map, fd, PAGE_SIZE, reserve=True, shared=False) == errno.EINVAL
    kernel.try_map(fd, PAGE_SIZE, reserve=True)


@item(17, 18)
def test_private_pages_fault(make: Make) -> None:
    """A file made without INIT_SHARED is mapped; a write or a look is SIGBUS (EFAULT to a system call)."""
    with mapped(make(PAGE_SIZE, MMAP), PAGE_SIZE) as address:
        assert signal_of(lambda: host.fill(address, 0xAA, PAGE_SIZE)) == signal.SIGBUS
        assert signal_of(lambda: look(address)) == signal.SIGBUS
        for advice in (uapi.MADV_POPULATE_READ, uapi.MADV_POPULATE_WRITE):
            assert errno_of(host.madvise, address, PAGE_SIZE, advice) == errno.EFAULT


@item(19, 20, 21, 22)
def test_shared_pages_hold_bytes_until_they_are_punched(kernel: Kernel, make: Make) -> None:
    """A mapping reads back what fills it; a punched page is zero, its neighbours stay, it fills again."""
    fd = make(4 * PAGE_SIZE)
    with mapped(fd, 4 * PAGE_SIZE) as address:
        host.fill(address, 0xAA, 4 * PAGE_SIZE)
        assert look(address, 4 * PAGE_SIZE) == b"\xaa" * 4 * PAGE_SIZE
        kernel.punch_hole(fd, 0, PAGE_SIZE)
        assert bytes(PAGE_SIZE) + b"\xaa" * 3 * PAGE_SIZE == look(address, 4 * PAGE_SIZE)
        host.fill(address, 0xBB, PAGE_SIZE)
        assert look(address, PAGE_SIZE) == b"\xbb" * PAGE_SIZE


@item(23, 24, 25)
def test_beyond_the_end_there_is_nothing(kernel: Kernel, make: Make) -> None:
    """A mapping longer than the file faults past the end; what is inside keeps its data."""
    fd = make(PAGE_SIZE)
    kernel.try_map(fd, 4 * PAGE_SIZE, reserve=True)
    with mapped(fd, 4 * PAGE_SIZE) as address:
        assert signal_of(lambda: host.fill(address, 0xAA, 4 * PAGE_SIZE)) == signal.SIGBUS
        assert signal_of(lambda: look(address + PAGE_SIZE)) == signal.SIGBUS
        assert look(address, PAGE_SIZE) == b"\xaa" * PAGE_SIZE


@item(26, 27)
def test_huge_alignment_and_advice_are_accepted(make: Make) -> None:
    """A mapping fixed at a PMD's boundary works, and so does MADV_HUGEPAGE on it."""
    fd = make(PMD)
    private = uapi.MAP_PRIVATE | uapi.MAP_ANONYMOUS | uapi.MAP_NORESERVE
    with syscalls.mapped(2 * PMD, uapi.PROT_NONE, private, -1) as room:
        aligned = -(-room // PMD) * PMD
        host.map_over(aligned, PMD, fd)
        host.madvise(aligned, PMD, host.MADV_HUGEPAGE)
        host.fill(aligned, 0xAA, PMD)
        assert look(aligned + PMD - 1) == b"\xaa"


@item(28)
def test_nothing_collapses(make: Make) -> None:
    """MADV_COLLAPSE is EINVAL."""
    fd = make(PMD)
    with mapped(fd, PMD) as address:
        host.fill(address, 0xAA, PMD)
        assert errno_of(host.madvise, address, PMD, host.MADV_COLLAPSE) == errno.EINVAL
        assert look(address) == b"\xaa"


@item(29)
def test_dontneed_keeps_the_page(make: Make) -> None:
    """MADV_DONTNEED drops the mapping's view of the page, not the page: it comes back with its data."""
    fd = make(PAGE_SIZE)
    with mapped(fd, PAGE_SIZE) as address:
        host.fill(address, 0xAA, PAGE_SIZE)
        host.madvise(address, PAGE_SIZE, mmap.MADV_DONTNEED)
        assert look(address, PAGE_SIZE) == b"\xaa" * PAGE_SIZE


# ---- NUMA --------------------------------------------------------------------------------------------------


@item(30)
def test_pages_land_on_the_node_of_the_policy(kernel: Kernel, make: Make) -> None:
    """What is populated under a policy is on its node (with one node that is no surprise)."""
    node = host.online_nodes()[-1]
    fd = make(4 * PAGE_SIZE)
    kernel.set_policy(fd, 4 * PAGE_SIZE, "bind", [node])
    kernel.populate(fd, 0, 4 * PAGE_SIZE, 1, policy="bind", nodes=[node])
    with mapped(fd, PAGE_SIZE) as address:
        look(address)
        assert node == host.node_of(address)


@item(31)
@pytest.mark.parametrize("flags", [MMAP, SHARED])
def test_policies_of_a_mapping_read_back(make: Make, flags: int) -> None:
    """mbind takes interleave, bind and default, which read back, and no unknown mode."""
    node = host.online_nodes()[-1]
    with mapped(make(PAGE_SIZE, flags), PAGE_SIZE) as address:
        for mode, nodes in (
            (uapi.MPOL_INTERLEAVE, [node]),
            (uapi.MPOL_BIND, [node]),
            (uapi.MPOL_DEFAULT, []),
        ):
            syscalls.mbind(address, PAGE_SIZE, mode, nodes)
            assert (mode, nodes) == syscalls.get_mempolicy(address)
        assert errno_of(syscalls.mbind, address, PAGE_SIZE, 999, [node]) == errno.EINVAL


# ---- allocation --------------------------------------------------------------------------------------------


def allocate(kernel: Kernel, fd: int, offset: int, size: int) -> int:
    """Return the errno of allocating; with the real kernel of the bare system call, too."""
    code = errno_of(kernel.allocate, fd, offset, size)
    if kernel.name == "kvm":
        assert code == errno_of(syscalls.fallocate, fd, KEEP, offset, size)
    return code


def punch(kernel: Kernel, fd: int, offset: int, size: int) -> int:
    """Return the errno of punching; with the real kernel of the bare system call, too."""
    code = errno_of(kernel.punch_hole, fd, offset, size)
    if kernel.name == "kvm":
        assert code == errno_of(syscalls.fallocate, fd, PUNCH, offset, size)
    return code


@item(32, 33, 34)
@each_flavour
def test_allocation_stays_inside_the_size(kernel: Kernel, make: Make, flags: int) -> None:
    """The whole file can be allocated; at its end and past it nothing can."""
    total = 4 * PAGE_SIZE
    fd = make(total, flags)
    assert allocate(kernel, fd, 0, total) == 0
    assert total == kernel.resident(fd)
    assert allocate(kernel, fd, total, PAGE_SIZE) == errno.EINVAL
    assert allocate(kernel, fd, total + PAGE_SIZE, PAGE_SIZE) == errno.EINVAL
    assert allocate(kernel, fd, 0, total + PAGE_SIZE) == errno.EINVAL
    assert (total, total) == (os.fstat(fd).st_size, kernel.resident(fd))


@item(35, 36, 37)
@each_flavour
def test_ranges_that_are_no_pages_are_refused(kernel: Kernel, make: Make, flags: int) -> None:
    """A punch or an allocation with an unaligned offset or length is EINVAL and changes nothing."""
    fd = make(4 * PAGE_SIZE, flags)
    kernel.allocate(fd, 0, 4 * PAGE_SIZE)
    ranges = [(PAGE_SIZE - 1, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE - 1), (1, PAGE_SIZE)]
    ranges += [(offset, size) for offset in (0, 1, PAGE_SIZE) for size in (1, PAGE_SIZE - 1, PAGE_SIZE + 1)]
    for offset, size in ranges:
        assert punch(kernel, fd, offset, size) == errno.EINVAL
        assert allocate(kernel, fd, offset, size) == errno.EINVAL
    assert kernel.resident(fd) == 4 * PAGE_SIZE


@item(38, 39, 40, 41)
@each_flavour
def test_holes_are_punched_and_filled(kernel: Kernel, make: Make, flags: int) -> None:
    """A punch inside frees pages, at the end and past it does nothing; the hole can be allocated again."""
    total = 4 * PAGE_SIZE
    fd = make(total, flags)
    kernel.allocate(fd, 0, total)
    assert punch(kernel, fd, total, PAGE_SIZE) == 0
    assert punch(kernel, fd, total + PAGE_SIZE, PAGE_SIZE) == 0
    assert total == kernel.resident(fd)
    assert punch(kernel, fd, PAGE_SIZE, 2 * PAGE_SIZE) == 0
    assert kernel.resident_ranges(fd, 0, total) == [(0, PAGE_SIZE), (3 * PAGE_SIZE, PAGE_SIZE)]
    assert allocate(kernel, fd, PAGE_SIZE, 2 * PAGE_SIZE) == 0
    assert [(0, total)] == kernel.resident_ranges(fd, 0, total)


# ---- memslots and binding: what makes a guest_memfd more than memory ---------------------------------------


@pytest.fixture
def own(kernel: Kernel) -> Iterator[LinuxKernel]:
    """A real kernel with a VM of its own, whose slots are all free."""
    with closing(LinuxKernel()) as made:
        yield made


@pytest.fixture
def bound(own: LinuxKernel) -> Iterator[int]:
    """A guest_memfd of four pages of that VM."""
    fd = own.create_guest_memfd(4 * PAGE_SIZE, SHARED)
    yield fd
    os.close(fd)


@item(42, 43)
def test_slots_take_no_unknown_flag(own: LinuxKernel, bound: int) -> None:
    """The old ioctl refuses each flag from bit 2 on, the new one each from bit 3 on."""
    with mapped(bound, PAGE_SIZE) as address:
        for bit in range(2, 32):
            refused = errno_of(host.set_region, own.vm, 0, 1 << bit, 0, PAGE_SIZE, address)
            assert refused == errno.EINVAL, bit
        for bit in range(3, 32):
            refused = errno_of(host.set_region2, own.vm, 0, bound, flags=1 << bit, address=address)
            assert refused == errno.EINVAL, bit
        host.set_region(own.vm, 0, 0, 0, PAGE_SIZE, address)


@item(44, 45)
def test_bound_slots_are_neither_logged_nor_read_only(own: LinuxKernel, bound: int) -> None:
    """GUEST_MEMFD goes with no other flag."""
    for other in (host.KVM_MEM_LOG_DIRTY_PAGES, host.KVM_MEM_READONLY):
        flags = uapi.KVM_MEM_GUEST_MEMFD | other
        assert errno_of(host.set_region2, own.vm, 0, bound, flags=flags) == errno.EINVAL
    host.set_region2(own.vm, 0, bound)


@item(46, 47, 48, 49)
def test_only_the_vms_own_guest_memfd_is_bound(own: LinuxKernel, bound: int, make: Make) -> None:
    """The device, a VM, a memfd and another VM's guest_memfd are EINVAL; a closed fd is EBADF."""
    memfd = own.memfd_create("ordinary", 0)
    own.truncate(memfd, PAGE_SIZE)
    device = os.open("/dev/kvm", os.O_RDWR)
    for fd in (device, own.vm, memfd, make(PAGE_SIZE)):
        assert errno_of(host.set_region2, own.vm, 0, fd) == errno.EINVAL
    os.close(memfd)
    os.close(device)
    assert errno_of(host.set_region2, own.vm, 0, -1) == errno.EBADF
    host.set_region2(own.vm, 0, bound)


@item(50, 51)
def test_binding_is_by_whole_pages(own: LinuxKernel, bound: int) -> None:
    """Each offset within a page is EINVAL, as is one outside the file; 0 is right."""
    for offset in (*range(1, PAGE_SIZE), 4 * PAGE_SIZE, (1 << 64) - PAGE_SIZE):
        assert errno_of(host.set_region2, own.vm, 0, bound, offset=offset) == errno.EINVAL, offset
    host.set_region2(own.vm, 0, bound, offset=0)


@item(52, 53)
def test_a_bound_file_may_be_closed_and_the_slot_deleted(own: LinuxKernel) -> None:
    """The slot outlives the fd, is immutable, and is deleted by size 0 with the flag."""
    fd = own.create_guest_memfd(PAGE_SIZE, SHARED)
    host.set_region2(own.vm, 0, fd)
    assert errno_of(host.set_region2, own.vm, 0, fd) == errno.EINVAL
    os.close(fd)
    host.set_region2(own.vm, 0, 0, size=0)


@item(54, 55)
def test_ranges_of_the_file_do_not_overlap(own: LinuxKernel, bound: int) -> None:
    """A second slot over part of the same range is refused: EINVAL, EEXIST from Linux 7.2 on."""
    host.set_region2(own.vm, 0, bound, size=2 * PAGE_SIZE, offset=PAGE_SIZE)
    for offset in (0, 2 * PAGE_SIZE):
        refused = errno_of(host.set_region2, own.vm, 1, bound, gpa=PMD, size=2 * PAGE_SIZE, offset=offset)
        assert refused in (errno.EINVAL, errno.EEXIST)  # which, test_recorded.py compares
    host.set_region2(own.vm, 1, bound, gpa=PMD, offset=3 * PAGE_SIZE)


@item(56, 57)
def test_guest_addresses_do_not_overlap(own: LinuxKernel, bound: int) -> None:
    """A second slot over part of the same guest addresses is EEXIST."""
    host.set_region2(own.vm, 0, bound, gpa=PAGE_SIZE, size=2 * PAGE_SIZE)
    for gpa in (0, 2 * PAGE_SIZE):
        refused = errno_of(host.set_region2, own.vm, 1, bound, gpa=gpa, size=2 * PAGE_SIZE, offset=2 * PAGE_SIZE)
        assert refused == errno.EEXIST
    host.set_region2(own.vm, 1, bound, gpa=3 * PAGE_SIZE, size=2 * PAGE_SIZE, offset=2 * PAGE_SIZE)


@item(58, 59)
def test_slots_are_numbered_up_to_a_limit(own: LinuxKernel, bound: int) -> None:
    """The first, the last and any other slot below what KVM says fit, one more does not.

    The number of a slot is what is limited; filling all 32764 takes seconds and shows nothing else.
    """
    slots = host.slots_of(own.vm)
    for page, slot in enumerate((0, slots // 2, slots - 1)):
        host.set_region2(own.vm, slot, bound, gpa=page * PAGE_SIZE, offset=page * PAGE_SIZE)
    more = errno_of(host.set_region2, own.vm, slots, bound, gpa=3 * PAGE_SIZE, offset=3 * PAGE_SIZE)
    assert more == errno.EINVAL


x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64: the guest's program is x86 code")


@item(60)
@x86
def test_a_bound_slot_needs_no_host_address(own: LinuxKernel, bound: int) -> None:
    """A guest uses a slot with host address 0; under PVM it sees no memory there (MMIO)."""
    with mapped(bound, 4 * PAGE_SIZE) as address:
        reason = run_guest(own, bound, address, 0)
        written = {host.EXIT_HLT: b"\xaa\xff", host.EXIT_MMIO: b"\xaa\xaa"}
        assert written[reason] == look(address + DATA, 2)


@item(61)
@x86
def test_a_guest_runs_on_the_file(own: LinuxKernel, bound: int) -> None:
    """With the file's own mapping as the host address the guest reads 0xaa and writes 0xff."""
    with mapped(bound, 4 * PAGE_SIZE) as address:
        assert run_guest(own, bound, address, address + DATA) == host.EXIT_HLT
        assert look(address + DATA, 2) == b"\xaa\xff"


# ---- what holds beyond the checklist -----------------------------------------------------------------------


def test_new_files_are_close_on_exec(make: Make) -> None:
    """The kernel never sets it on a guest_memfd; gmemd does."""
    assert not os.get_inheritable(make(PAGE_SIZE))


def test_new_files_are_private_to_their_owner(make: Make) -> None:
    """Mode 0600: another user cannot reopen the file through /proc."""
    assert os.fstat(make(PAGE_SIZE)).st_mode & 0o7777 == 0o600


def test_the_size_is_fixed_for_life(kernel: Kernel, make: Make) -> None:
    """No holder can resize the file, so no process can truncate memory under another."""
    fd = make(4 * PAGE_SIZE)
    for size in (0, PAGE_SIZE, 8 * PAGE_SIZE):
        assert errno_of(kernel.truncate, fd, size) in (errno.EINVAL, errno.EPERM)
    assert os.fstat(fd).st_size == 4 * PAGE_SIZE


def test_memory_lives_as_long_as_anybody_holds_it(kernel: Kernel) -> None:
    """A mapping alone keeps the bytes."""
    fd = kernel.create_guest_memfd(PAGE_SIZE, SHARED)
    with mapped(fd, PAGE_SIZE) as address:
        host.fill(address, 0xAA, PAGE_SIZE)
        os.close(fd)
        assert look(address, PAGE_SIZE) == b"\xaa" * PAGE_SIZE


def test_a_hole_is_counted_only_when_looked_at(kernel: Kernel, make: Make) -> None:
    """Measuring allocates nothing; a look through a mapping allocates the page it meets."""
    fd = make(4 * PAGE_SIZE)
    kernel.try_map(fd, 4 * PAGE_SIZE, reserve=True)
    assert kernel.resident(fd) == 0
    assert bytes(PAGE_SIZE) == read_page(fd, 2)
    assert kernel.resident_ranges(fd, 0, 4 * PAGE_SIZE) == [(2 * PAGE_SIZE, PAGE_SIZE)]
    write_page(fd, 0, 1)
    assert kernel.resident(fd) == 2 * PAGE_SIZE


def test_what_the_simulation_cannot_impose(kernel: Kernel, make: Make) -> None:
    """docs/kernel.md says what a holder of a stand-in can do beyond the rules: this is true, and only of it."""
    fd = make(2 * PAGE_SIZE)
    write_page(fd, 0, 0xAA)

    def try_map(flags: int, prot: int) -> None:
        with mapped(fd, PAGE_SIZE, flags=flags, prot=prot):
            pass

    outcomes = {
        "read": errno_of(os.pread, fd, 1, 0),
        "punch a part of a page": errno_of(syscalls.fallocate, fd, PUNCH, 1, 1),
        "map privately": errno_of(try_map, uapi.MAP_PRIVATE, uapi.PROT_READ),
        "map to execute": errno_of(try_map, uapi.MAP_SHARED, host.PROT_EXEC),
        "reopen": errno_of(lambda: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))),
        "get seals": errno_of(fcntl.fcntl, fd, uapi.F_GET_SEALS),
    }
    if kernel.simulated:
        assert outcomes == dict.fromkeys(outcomes, 0)
    else:
        codes = (errno.ESPIPE, errno.EINVAL, errno.EINVAL, errno.EPERM, errno.ENXIO, errno.EINVAL)
        assert tuple(outcomes.values()) == codes

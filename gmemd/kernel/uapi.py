"""Numbers of the Linux user API to create, map and measure memory, each group with its header.

Request numbers are equal on x86-64 and arm64 (generic layout: direction << 30 | size << 16 | 0xAE << 8 |
number). Facts: docs/kernel.md and the reference page on guest_memfd, section 2.
"""

from __future__ import annotations

from typing import Final

# linux/kvm.h
KVM_API_VERSION: Final = 12
KVM_GET_API_VERSION: Final = 0xAE00
KVM_CREATE_VM: Final = 0xAE01
KVM_CHECK_EXTENSION: Final = 0xAE03
KVM_CREATE_GUEST_MEMFD: Final = 0xC040AED4
KVM_CREATE_GUEST_MEMFD_FORMAT: Final = "<QQ48x"  # u64 size, u64 flags, u64 reserved[6] (send zeros)
KVM_SET_USER_MEMORY_REGION2: Final = 0x40A0AE49
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
KVM_SET_MEMORY_ATTRIBUTES2: Final = 0xC080AED2  # proposed, on the guest_memfd itself; ENOTTY: no conversion
KVM_SET_MEMORY_ATTRIBUTES2_SIZE: Final = 128  # bytes

KVM_CAP_USER_MEMORY2: Final = 231
KVM_CAP_MEMORY_ATTRIBUTES: Final = 233
KVM_CAP_GUEST_MEMFD: Final = 234
KVM_CAP_VM_TYPES: Final = 235
KVM_CAP_PRE_FAULT_MEMORY: Final = 236
KVM_CAP_GUEST_MEMFD_FLAGS: Final = 244  # ask the VM fd: the answer depends on the VM's type
KVM_CAP_ARM_VM_IPA_SIZE: Final = 165

GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1
GUEST_MEMFD_FLAG_NO_DIRECT_MAP: Final = 1 << 2  # proposed, in no release
GUEST_MEMFD_SHARED: Final = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED  # what another process's VM can use

# linux/magic.h
ANON_INODE_FS_MAGIC: Final = 0x09041934  # guest_memfd before Linux 6.19
GUEST_MEMFD_MAGIC: Final = 0x474D454D
HUGETLBFS_MAGIC: Final = 0x958458F6
TMPFS_MAGIC: Final = 0x01021994
SECRETMEM_MAGIC: Final = 0x5345434D

# linux/memfd.h
MFD_CLOEXEC: Final = 0x1
MFD_ALLOW_SEALING: Final = 0x2
MFD_HUGETLB: Final = 0x4
MFD_EXEC: Final = 0x10  # Linux 6.3
MFD_HUGE_SHIFT: Final = 26

# linux/fcntl.h
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 0x01
F_SEAL_SHRINK: Final = 0x02
F_SEAL_GROW: Final = 0x04
F_SEAL_WRITE: Final = 0x08
F_SEAL_FUTURE_WRITE: Final = 0x10
F_SEAL_EXEC: Final = 0x20  # Linux 6.3
SEALS_OF_SIZE: Final = F_SEAL_SHRINK | F_SEAL_GROW  # the size is fixed, and writing can still be sealed

# linux/falloc.h
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02

# asm-generic/mman-common.h, mman.h
PROT_NONE: Final = 0x0
PROT_READ: Final = 0x1
PROT_WRITE: Final = 0x2
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

# linux/fs.h
PAGEMAP_SCAN: Final = 0xC0606610
PAGEMAP_SCAN_FORMAT: Final = "<12Q"  # size, flags, start, end, walk_end (out), vec, vec_len, max_pages, 4 masks
PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1
PAGE_IS_WRITTEN: Final = 1 << 1

# linux/mempolicy.h
MPOL_DEFAULT: Final = 0
MPOL_PREFERRED: Final = 1
MPOL_BIND: Final = 2
MPOL_INTERLEAVE: Final = 3
MPOL_PREFERRED_MANY: Final = 5  # Linux 5.15
MPOL_F_ADDR: Final = 1 << 1

# linux/fs.h, linux/openat2.h
FICLONE: Final = 0x40049409
RENAME_NOREPLACE: Final = 1 << 0
RENAME_EXCHANGE: Final = 1 << 1
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

# asm/unistd.h. cachestat (Linux 6.5) and openat2 (5.6) have one number everywhere.
SYS_CACHESTAT: Final = 451
SYS_OPENAT2: Final = 437
SYS_RENAMEAT2: Final = {"x86_64": 316, "aarch64": 276}
SYS_KCMP: Final = {"x86_64": 312, "aarch64": 272}
KCMP_FILE: Final = 0
SYS_MEMPOLICY: Final = {  # machine: (mbind, set_mempolicy, get_mempolicy)
    "x86_64": (237, 238, 239),
    "aarch64": (235, 237, 236),
}

OFFSET_MAX: Final = (1 << 63) - 1  # of loff_t
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3

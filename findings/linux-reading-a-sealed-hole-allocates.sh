#!/bin/sh
# Reading a hole of a memfd that is sealed against writing allocates it, if it is read through a mapping.
. "$(dirname "$0")/common"
make_tree trixie python3
uname -r
chroot "$tree" python3 - <<'PYTHON' | tee "$temporary/told"
import fcntl, mmap, os

SIZE = 64 << 20
fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
os.ftruncate(fd, SIZE)
fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
print("sealed:", os.fstat(fd).st_blocks >> 11, "MiB")
while os.pread(fd, 1 << 20, os.lseek(fd, 0, os.SEEK_CUR)):
    os.lseek(fd, 1 << 20, os.SEEK_CUR)
print("after pread:", os.fstat(fd).st_blocks >> 11, "MiB")
with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ) as view:
    read = sum(view[offset] for offset in range(0, SIZE, mmap.PAGESIZE))
print("after reading a private mapping, read-only:", os.fstat(fd).st_blocks >> 11, "MiB")
PYTHON
[ "$(sed 's/.*: //' "$temporary/told" | tr '\n' ' ')" = '0 MiB 0 MiB 64 MiB ' ]

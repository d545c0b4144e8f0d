"""memory-backend-file: memory behind a path; the file stays when the object goes."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.base import Kernel


class FileBackend(HostMemoryBackend):
    """Private by default; a missing file is made, a directory gets an unlinked temporary file."""

    qom_type = "memory-backend-file"
    on_trial = False
    own_order = ("readonly", "align", "offset", "mem-path", "rom", "discard-data")
    fixed: ClassVar[dict[str, str]] = {
        **HostMemoryBackend.fixed,
        "mem-path": "cannot change property '{name}' of {type}",
        "align": "cannot change property '{name}' of {type}",
        "offset": "cannot change property '{name}' of {type}",
        "readonly": "cannot change property '{name}' of {type}.",
        "rom": "cannot change property '{name}' of {type}.",
    }
    unseen = HostMemoryBackend.unseen | {"align", "offset", "rom"}
    _made = False  # the file was not there before

    @property
    def blocks(self) -> bool:
        """Opening a FIFO waits for its other end."""
        if super().blocks:
            return True
        try:
            return stat.S_ISFIFO(os.stat(self.properties["mem-path"]).st_mode)
        except (OSError, ValueError):
            return False

    def get(self, name: str) -> object:
        if name == "rom" and self.properties["rom"] == "auto":
            return "on" if self.properties["readonly"] else "off"
        return super().get(name)

    def allocate(self, kernel: Kernel) -> None:
        self._check_rom()
        self.kind = "file"
        path = self.properties["mem-path"]
        self.fd, self._made = self._open(path)
        with os_errors(f"can't use backing store {path} for guest RAM"):
            self._check_file(kernel)
        if self.size % kernel.page_size:
            self._made = False  # judged so late that QEMU leaves the file
            raise QmpError(f"backend '{self.qom_type}' memory size must be multiple of {kernel.page_size // 1024} KiB")

    def _check_rom(self) -> None:
        rom, readonly = self.properties["rom"], self.properties["readonly"]
        if rom == "on" and not readonly:
            raise QmpError("property 'rom' = 'on' is not supported with 'readonly' = 'off'")
        if rom == "off" and readonly and self.properties["share"]:
            raise QmpError("property 'rom' = 'off' is incompatible with 'readonly' = 'on' and 'share' = 'on'")

    def _open(self, path: str) -> tuple[int, bool]:
        """Open or make the file: fd (owned by the caller), and whether it was made."""
        mode = (os.O_RDONLY if self.properties["readonly"] else os.O_RDWR) | os.O_CLOEXEC
        try:
            while True:
                try:
                    fd = os.open(path, mode)
                    if not _is_directory(fd):
                        return fd, False
                    close_fd(fd)
                    return _open_unlinked(path), False
                except IsADirectoryError:
                    return _open_unlinked(path), False
                except FileNotFoundError:
                    if self.properties["readonly"]:
                        raise
                try:
                    return os.open(path, mode | os.O_CREAT | os.O_EXCL, 0o644), True
                except FileExistsError:
                    continue
        except (OSError, ValueError) as exc:
            reason = os.strerror(exc.errno or 0) if isinstance(exc, OSError) else "No such file or directory"
            raise QmpError(f"can't open backing store {path} for guest RAM: {reason}") from exc

    def _check_file(self, kernel: Kernel) -> None:
        properties, page = self.properties, kernel.file_page_size(self.fd)
        align, offset = properties["align"], properties["offset"]
        self.memory_size = self.round_up(page)
        actual = os.fstat(self.fd).st_size
        if actual:
            self.check_backing(actual, offset)
        if align % page:
            raise QmpError(f"alignment {align:#x} must be multiples of page size {page:#x}")
        if align & (align - 1):
            raise QmpError(f"alignment {align:#x} must be a power of two")
        if offset % page:
            raise QmpError(f"offset {offset:#x} must be multiples of page size {page:#x}")
        if self.memory_size < page:
            raise QmpError(f"memory size {self.memory_size:#x} must be equal to or larger than page size {page:#x}")
        readonly = properties["readonly"]
        failure = self._grow(kernel, offset) if not actual and not readonly else ""
        self.offset = offset
        if (self.memory_size + max(align, page)) % (1 << 64) == 0:  # QEMU adds the alignment before it maps
            raise QmpError("unable to map backing store for guest RAM: Invalid argument")
        self.check_mappable(kernel, offset=offset, writable=not readonly, shared=properties["share"])
        if failure:  # who touched it would get SIGBUS
            raise QmpError(f"cannot resize backing store {properties['mem-path']} for guest RAM: {failure}")

    def _grow(self, kernel: Kernel, offset: int) -> str:
        """Give an empty file its size; why that failed. What has no size (FIFO, device) is left to mmap."""
        try:
            kernel.truncate(self.fd, self.memory_size + offset)
        except OSError as exc:
            return os.strerror(exc.errno or 0) if stat.S_ISREG(os.fstat(self.fd).st_mode) else ""
        return ""

    def abandon(self) -> None:
        super().abandon()
        if self._made:
            with contextlib.suppress(OSError):
                os.unlink(self.properties["mem-path"])

    def finish(self, kernel: Kernel) -> None:
        if self.properties["readonly"] and self.properties["prealloc"]:
            raise QmpError("qemu_prealloc_mem: preallocating memory failed: Bad address")
        super().finish(kernel)


def _is_directory(fd: int) -> bool:
    """Is it a directory? Closes the fd when that cannot be told."""
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:
        close_fd(fd)
        raise


def _open_unlinked(directory: str) -> int:
    while True:
        path = os.path.join(directory, f"gmemd-memory.{os.urandom(8).hex()}")
        with contextlib.suppress(FileExistsError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
    try:
        os.unlink(path)
    except OSError:
        close_fd(fd)
        raise
    return fd

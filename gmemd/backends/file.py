"""memory-backend-file: memory in the file at a path; the file stays when the object is deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from typing import Any, ClassVar, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.beneath import ANYWHERE, Paths
from gmemd.kernel.kernel import Kernel

_TRIES: Final = 100  # to open or create a file that comes and goes
_LEASE_SECONDS: Final = 60.0  # the kernel breaks a lease after 45 (/proc/sys/fs/lease-break-time)
_PAUSE: Final = 0.02  # seconds


class FileBackend(HostMemoryBackend):
    """Private by default; a missing file is created, a directory gets an unlinked temporary file."""

    qom_type = "memory-backend-file"
    on_file = True
    can_be_tried = False
    own_order = ("pmem", "align", "offset", "mem-path", "rom", "discard-data", "readonly")
    fixed: ClassVar[dict[str, str]] = {
        **HostMemoryBackend.fixed,
        "mem-path": "cannot change property '{name}' of {type}",
        "align": "cannot change property '{name}' of {type}",
        "offset": "cannot change property '{name}' of {type}",
        "readonly": "cannot change property '{name}' of {type}.",
        "rom": "cannot change property '{name}' of {type}.",
        "pmem": "cannot change property '{name}' of {type}.",
    }
    unseen = HostMemoryBackend.unseen | {"align", "offset", "rom"}
    _made = False  # the file did not exist before

    def __init__(self, object_id: str, properties: dict[str, Any]) -> None:
        super().__init__(object_id, properties)
        self.paths = ANYWHERE  # how its file is found

    def get(self, name: str) -> object:
        if name == "rom" and self.properties["rom"] == "auto":
            return "on" if self.properties["readonly"] else "off"
        return super().get(name)

    def allocate(self, kernel: Kernel) -> None:
        self._check_rom()
        self.kind = "file"
        path = self.properties["mem-path"]
        self.waits = True
        self.fd, self._made = self._open(path)
        with os_errors(f"can't use backing store {path} for guest RAM"):
            self._check_file(kernel)
            self.file_kind, self.status = kernel.identify(self.fd), os.fstat(self.fd)
        self.waits = False

    def _check_rom(self) -> None:
        rom, readonly = self.properties["rom"], self.properties["readonly"]
        if rom == "on" and not readonly:
            raise QmpError("property 'rom' = 'on' is not supported with 'readonly' = 'off'")
        if rom == "off" and readonly and self.properties["share"]:
            raise QmpError("property 'rom' = 'off' is incompatible with 'readonly' = 'on' and 'share' = 'on'")

    def _open(self, path: str) -> tuple[int, bool]:
        """Open or create the file: fd (owned by the caller), and whether it was created."""
        readonly = self.properties["readonly"]
        mode = (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        try:
            return self._opened(path, mode, make=not readonly)
        except (OSError, ValueError) as exc:
            reason = os.strerror(exc.errno or 0) if isinstance(exc, OSError) else "No such file or directory"
            raise QmpError(f"can't open backing store {path} for guest RAM: {reason}") from exc

    def _opened(self, path: str, mode: int, *, make: bool) -> tuple[int, bool]:
        for _ in range(_TRIES):
            try:
                fd = self._open_existing(path, mode)
                if not _is_directory(fd):
                    return fd, False
                close_fd(fd)
                raise IsADirectoryError(errno.EISDIR, "")
            except IsADirectoryError:
                if not make:
                    raise
                return _open_unlinked(path, self.paths), False
            except FileNotFoundError:
                if not make:
                    raise
            try:
                return _made(path, mode, self.paths), True
            except FileExistsError:  # another process was faster, or it is a dangling symbolic link
                continue
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _open_existing(self, path: str, mode: int) -> int:
        """Open it as if waiting in open(2): for a lease to end (F_SETLEASE), for the other end of a FIFO.

        But not in open(2) itself, which would not return when the client has gone.
        """
        end = time.monotonic() + _LEASE_SECONDS
        while True:
            try:
                fd = self.paths.open(path, mode)
                break
            except BlockingIOError:
                if not stat.S_ISREG(self.paths.stat(path).st_mode) or time.monotonic() > end:
                    raise
            self._check_wanted()
            time.sleep(_PAUSE)
        try:
            while self.properties["readonly"] and not _has_writer(fd):
                self._check_wanted()
        except BaseException:
            close_fd(fd)
            raise
        return _waiting(fd)

    def _check_wanted(self) -> None:
        if self.unwanted:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def _check_file(self, kernel: Kernel) -> None:
        """Check size, alignment and offset against the file and its pages; give an empty file its size."""
        properties, page = self.properties, kernel.file_page_size(self.fd)
        align, offset, readonly = properties["align"], properties["offset"], properties["readonly"]
        self.memory_size = self.round_up(kernel.page_size)
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
        self.memory_size = self.round_up(page)
        self.offset = offset
        self.check_mappable(kernel, align=max(align, page), offset=offset, writable=not readonly,
                            shared=properties["share"])
        if not actual and not readonly:
            self._grow(kernel)
        if self.size % page:
            self._made = False  # checked so late that QEMU leaves the file
            raise QmpError(f"backend '{self.qom_type}' memory size must be multiple of {_in_units(page)}")

    def _grow(self, kernel: Kernel) -> None:
        """Give an empty file its size, because an access beyond its end would be SIGBUS.

        What has no size (FIFO, device) is left to mmap(2).
        """
        try:
            kernel.truncate(self.fd, self.memory_size + self.offset)
        except OSError as exc:
            if stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise QmpError(f"cannot resize backing store {self.properties['mem-path']} for guest RAM: "
                               f"{os.strerror(exc.errno or 0)}") from exc

    def abandon(self) -> None:
        super().abandon()
        if self._made:
            with contextlib.suppress(OSError):
                self.paths.unlink(self.properties["mem-path"])

    def discard(self, kernel: Kernel, fd: int) -> None:
        """With discard-data, punch the object's part out of a shared file, as QEMU does with MADV_REMOVE."""
        properties = self.properties
        if properties["discard-data"] and properties["share"] and not properties["readonly"]:
            with contextlib.suppress(OSError):  # not every file system supports it
                kernel.punch_hole(fd, self.offset, self.memory_size)

    def finish(self, kernel: Kernel) -> None:
        if self.properties["readonly"] and self.properties["prealloc"]:
            raise QmpError("qemu_prealloc_mem: preallocating memory failed: Bad address")
        super().finish(kernel)


def _in_units(size: int) -> str:
    """A page size as QEMU writes it."""
    unit, name = next((unit, name) for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
                      if size >= unit)
    return f"{size // unit} {name}"


def _waiting(fd: int) -> int:
    """Turn an fd that was opened with O_NONBLOCK into an ordinary one; closes it when that fails."""
    try:
        os.set_blocking(fd, True)
    except OSError:
        close_fd(fd)
        raise
    return fd


def _made(path: str, mode: int, paths: Paths) -> int:
    """Create a file; if it cannot be used, nothing is left of it."""
    fd = paths.open(path, mode | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        return _waiting(fd)
    except OSError:
        paths.unlink(path)
        raise


def _has_writer(fd: int) -> bool:
    """Wait a little for the writer of a FIFO opened for reading; True if there is one, or the file is not a FIFO."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return True
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if poll.poll(_PAUSE * 1000):  # it has written, or has gone again
        return True
    try:
        return bool(os.read(fd, 1))
    except BlockingIOError:  # it exists and has not written
        return True


def _is_directory(fd: int) -> bool:
    """Is it a directory? Closes the fd if that cannot be found out."""
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:
        close_fd(fd)
        raise


def _open_unlinked(directory: str, paths: Paths) -> int:
    fd = -1
    while fd < 0:
        path = os.path.join(directory, f"gmemd-memory.{os.urandom(8).hex()}")
        with contextlib.suppress(FileExistsError):
            fd = paths.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        paths.unlink(path)
    except OSError:
        close_fd(fd)
        with contextlib.suppress(OSError):
            paths.unlink(path)
        raise
    return fd

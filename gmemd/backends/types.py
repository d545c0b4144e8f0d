"""The backends by qom-type."""

from __future__ import annotations

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.file import FileBackend
from gmemd.backends.guest_memfd import GuestMemfdBackend
from gmemd.backends.memfd import MemfdBackend
from gmemd.backends.ram import RamBackend
from gmemd.backends.shm import ShmBackend

BACKENDS: dict[str, type[HostMemoryBackend]] = {
    backend.qom_type: backend for backend in (RamBackend, FileBackend, MemfdBackend, ShmBackend, GuestMemfdBackend)
}

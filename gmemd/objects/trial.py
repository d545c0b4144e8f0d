"""Objects to try changes on: a copy of the container that nobody sees, in which nothing has descriptors of its own."""

from __future__ import annotations

from collections.abc import Iterable

from gmemd.backends.base import HostMemoryBackend
from gmemd.errors import QmpError
from gmemd.objects.container import Objects, ThreadContext


class Trial(Objects):
    """A copy of the container. An object is copied when it is looked at by its id; its descriptor is the original's."""

    def __init__(self, real: Objects) -> None:
        super().__init__(real.tenant)
        self._live = dict(real._live)
        self.contexts = {name: ThreadContext(name, context.cpus) for name, context in real.contexts.items()}
        for name in real._slots:
            self._slots.add(name)
        self._adding = set(real._adding)
        self._barred = dict(real._barred)
        self._actual = real
        self._originals: dict[HostMemoryBackend, HostMemoryBackend] = {}  # by their copies

    def get(self, object_id: str) -> HostMemoryBackend | None:
        backend, real = self._live.get(object_id), self._actual.get(object_id)
        if backend is not None and backend is real:
            backend = self._live[object_id] = self._copied(backend)
            self._originals[backend] = real
        if backend is not None and self._originals.get(backend, real) is not real:
            return None  # it was deleted meanwhile: the descriptor is no longer there
        return backend

    def find(self, object_id: str) -> HostMemoryBackend:
        backend = self.get(object_id)
        if backend is None:
            raise QmpError(f"object '{object_id}' not found")
        return backend

    def remove_context(self, object_id: str) -> list[HostMemoryBackend]:
        for name in list(self._live):
            self.get(name)
        return super().remove_context(object_id)

    def restore_context(self, context: ThreadContext, users: Iterable[HostMemoryBackend]) -> None:
        raise AssertionError("a trial is not undone")

    def _copied(self, backend: HostMemoryBackend) -> HostMemoryBackend:
        other = backend.copy()
        other.home = self
        return other

"""The order of a GLib hash table of strings, as far as it shows on the wire.

QEMU keeps the children of /objects, and the arguments not yet asked for, in a GHashTable and walks it
in slot order; clients see that order. This is the same table as a set: open addressing over 2^s slots,
triangular probing, tombstones, and a rebuild in place. Rules: reference qmp.md section 4, "Order of
GLib sets". A dict beside the slots knows which names are in the set, and where, so that only add() has to hash and
probe.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache
from typing import Final

_MIN_SHIFT: Final = 3
_FREE: Final = 0  # no hash is 0 or 1: those two become 2
_TOMBSTONE: Final = 1
_REMEMBERED_LENGTH: Final = 64  # characters of a name whose hash is worth keeping


class GHashSet:
    """A set of strings which iterates in the slot order of GLib's GHashTable."""

    __slots__ = ("_hashes", "_modulus", "_names", "_occupied", "_slots")

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._slots: dict[str, int] = {}  # each name's slot
        self._hashes = [_FREE] * (1 << _MIN_SHIFT)  # hash, _FREE or _TOMBSTONE of each slot
        self._names = [""] * (1 << _MIN_SHIFT)
        self._modulus = _largest_prime_below(1 << _MIN_SHIFT)
        self._occupied = 0  # slots with a name or a tombstone
        for name in names:
            self.add(name)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, hash_ in zip(self._names, self._hashes, strict=True) if hash_ > _TOMBSTONE])

    def add(self, name: str) -> None:
        """Put the name into the first tombstone on its probe path, else into the free slot that ends it."""
        if name in self._slots:
            return
        hashes = self._hashes
        mask = len(hashes) - 1
        hash_ = _remembered_hash(name) if len(name) <= _REMEMBERED_LENGTH else _compute_hash(name)
        slot = (hash_ * 11 & 0xFFFFFFFF) % self._modulus
        step = 0
        while hashes[slot] > _TOMBSTONE:
            step += 1
            slot = (slot + step) & mask
        was_free = hashes[slot] == _FREE
        hashes[slot] = hash_
        self._names[slot] = name
        self._slots[name] = slot
        if was_free:
            self._occupied += 1
            self._rebuild_if_needed()

    def discard(self, name: str, *, rebuild: bool = True) -> None:
        """Leave a tombstone in the name's place; then shrink if it is time and `rebuild` allows it."""
        slot = self._slots.pop(name, None)
        if slot is None:
            return
        self._hashes[slot] = _TOMBSTONE
        self._names[slot] = ""
        if rebuild:
            self._rebuild_if_needed()

    def _rebuild_if_needed(self) -> None:
        size = len(self._hashes)
        count = len(self._slots)
        crowded = self._occupied + self._occupied // 16 >= size
        sparse = size > 4 * count and size > 1 << _MIN_SHIFT
        if crowded or sparse:
            self._rebuild(1 << max(int(count * 1.333).bit_length(), _MIN_SHIFT))

    def _rebuild(self, size: int) -> None:
        """Place every name again in `size` slots, each displacing the one not yet placed that it meets."""
        old_size = len(self._hashes)
        grown = max(size - old_size, 0)
        hashes = self._hashes + [_FREE] * grown
        names = self._names + [""] * grown
        placed = bytearray(len(hashes))
        modulus, mask = _largest_prime_below(size), size - 1
        for start in range(old_size):
            if placed[start]:
                continue
            hash_, name = hashes[start], names[start]
            hashes[start], names[start] = _FREE, ""
            while hash_ > _TOMBSTONE:
                slot = (hash_ * 11 & 0xFFFFFFFF) % modulus
                step = 0
                while placed[slot]:
                    step += 1
                    slot = (slot + step) & mask
                placed[slot] = True
                self._slots[name] = slot
                hashes[slot], hash_ = hash_, hashes[slot]
                names[slot], name = name, names[slot]
        self._hashes, self._names, self._modulus = hashes[:size], names[:size], modulus
        self._occupied = len(self._slots)


def first_unexpected(given: Iterable[str], declared: Collection[str]) -> str | None:
    """Name the argument QEMU would call unexpected, or None if all of `given` are declared.

    `given` is in member order (qmp.encode.member_order), `declared` in schema order: QEMU strikes out one
    declared member after the other, and the order can show where many were given.
    """
    left = GHashSet(given)
    for name in declared:
        left.discard(name)
    return next(iter(left), None)


def _compute_hash(name: str) -> int:
    """Hash as g_str_hash does: signed bytes of the name as a C string (NUL as C0 80), 32 bits."""
    value = 5381
    for byte in name.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80"):
        value = (value * 33 + byte - (byte >> 7 << 8)) & 0xFFFFFFFF
    return value if value > _TOMBSTONE else _TOMBSTONE + 1


_remembered_hash = lru_cache(maxsize=4096)(_compute_hash)


@lru_cache(maxsize=32)
def _largest_prime_below(size: int) -> int:
    """Find the modulus GLib uses for a table of `size` slots (7 for 8, 13 for 16, 31 for 32, ...)."""
    candidate = size - 1
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate -= 1
    return candidate

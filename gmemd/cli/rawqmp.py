"""Raw QMP typed by hand: whether it is complete, and how many replies it will get."""

from __future__ import annotations

from gmemd.qmp.stream import NEED_DATA, Stream

_PROBE = b"{}"


def whole_messages(data: bytes) -> int | None:
    """Return how many replies QEMU gives to these bytes; None when the last message is not complete.

    A blank must end the data: only then does QEMU take a number as complete.
    """
    stream = Stream()
    stream.feed(data)
    count = 0
    while stream.next() is not NEED_DATA:  # an error is a reply too
        count += 1
    # only between messages is an empty object returned, and at once
    stream.feed(_PROBE)
    return count if stream.next() == {} else None

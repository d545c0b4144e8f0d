"""The count of what the service manager holds."""

from __future__ import annotations

import pytest

from gmemd.errors import QmpError
from gmemd.persist.fdstore import FdStore
from gmemd.persist.keeping import SPARED


class TestRoom:
    """What the manager would drop is refused before it is made."""

    def test_limit(self) -> None:
        store = FdStore(2)
        store.account("a")
        store.reserve()
        with pytest.raises(QmpError, match="FileDescriptorStoreMax="):
            store.reserve()
        store.release()
        store.reserve()

    def test_what_leaves_makes_room_but_goes_first(self) -> None:
        """An entry on its way out lets a new one be promised, and then has to go before it comes."""
        store = FdStore(1)
        store.account("a")
        store.leaving.add("a")
        store.reserve()
        store.release()
        assert store.crowded(["b"])
        store.forget(["a"])
        assert not store.crowded(["b"])
        assert len(store) == 0

    def test_names_fit_the_environment(self) -> None:
        """The sum of all names, each with a colon, is at most 131,057 bytes, sockets of activation included."""
        store = FdStore(10_000)
        store.account_socket("x" * 32)
        for number in range(1000):
            store.account(f"{number:0130}")
        store.reserve()  # 24 bytes
        store.release()
        store.account_socket("")
        with pytest.raises(QmpError, match="128 KiB"):
            store.reserve()

    def test_all_of_a_name_leave_together(self) -> None:
        store = FdStore(3)
        store.account("a")
        store.account("a")
        store.account("b")
        store.forget(["a"])
        store.forget(["a"])
        assert (len(store), "a" in store, "b" in store) == (1, False, True)


def test_what_the_next_start_cannot_be_given_is_refused() -> None:
    """The store's limit or that of open files, whichever is smaller; sockets of activation take room there, too."""
    store = FdStore(9, handed_down=SPARED + 4)
    store.account_socket("qmp")
    assert store.room == 3
    for name in "abc":
        store.reserve()
        store.release()
        store.account(name)
    with pytest.raises(QmpError, match=r"the next start can be given at most 3 .*LimitNOFILE= \(it is 68\)"):
        store.reserve()
    store.handed_down = 1024
    store.limit = 3
    with pytest.raises(QmpError, match="the service manager keeps at most 3 file descriptors"):
        store.reserve()
    store.limit = 4
    store.reserve()

"""The registry: records, versions, damage."""

from __future__ import annotations

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from zlib import crc32

import pytest

from gmemd.errors import QmpError
from gmemd.persist.record import COLUMNS, Record, record_of, row_of
from gmemd.persist.registry import NotWritten, Registry
from gmemd.persist.tables import MIGRATIONS, RegistryTooNew

ARGUMENTS = {"qom-type": "memory-backend-memfd", "size": 2**64 - 1, "share": True, "x": [1.5, None, "é\ud800\0"]}


def record(number: int = 1) -> Record:
    return Record(
        f"ram{number}", "memory-backend-memfd", ARGUMENTS, "memfd", 2**63, "kvm", 1000, 77, 1_700_000_000,
        {"lease": 3}, number, f"m-x-{number}", 1, 2**64 - 1, 4096,
    )  # fmt: skip


def fill(path: Path, count: int = 3) -> str:
    """A registry of some records; its generation."""
    with closing(Registry(str(path))) as registry:
        for number in range(1, count + 1):
            registry.apply(put=[row_of(record(number))], last_seq=number)
        return registry.state.generation


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every write fail that makes a file longer."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_record_survives_the_row() -> None:
    assert record_of(row_of(record())) == record()


def test_a_record_of_an_earlier_gmemd_says_an_origin() -> None:
    columns = COLUMNS.split(", ")
    row = (*("qmp" if name == "origin" else value for name, value in zip(columns, row_of(record()), strict=True)),)[:-1]
    checksum = crc32(("%s\x1f" * len(row) % row).encode())
    assert record_of((*row, checksum)) == record()


def test_what_cannot_be_written_is_refused_before() -> None:
    with pytest.raises(ValueError):
        row_of(record().changed(id="\udc80"))
    with pytest.raises(TypeError):
        row_of(record().changed(arguments={"a": b""}))


def test_kept_over_a_restart(tmp_path: Path) -> None:
    """Records in the order of their creation, the generation and the highest sequence number."""
    path = tmp_path / "r"
    with closing(Registry(str(path))) as registry:
        registry.apply(put=[row_of(record(n)) for n in (10, 9, 2)], last_seq=10)
        registry.apply(put=[row_of(record(9).changed(extra={"more": 1}))], last_seq=10)
        registry.apply(delete=["ram10"], removing={"m-x-10"}, last_seq=10)
        generation = registry.state.generation
    with closing(Registry(str(path))) as registry:
        assert registry.records == [record(2), record(9).changed(extra={"more": 1})]
        assert registry.state.removing == ("m-x-10",)
        assert (registry.state.generation, registry.state.last_seq) == (generation, 10)


def test_killed_process_leaves_what_it_committed(tmp_path: Path) -> None:
    """SIGKILL right after apply, and in the middle of a transaction."""
    program = f"""
import os, sys
from gmemd.persist.registry import Registry
from tests.persist.test_registry import record, row_of
registry = Registry({str(tmp_path / "r")!r})
registry.apply(put=[row_of(record(n)) for n in range(500)], last_seq=499)
registry._db.execute("PRAGMA cache_size = 2")
registry._db.execute("BEGIN")
registry._db.execute("DELETE FROM objects")
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert os.path.getsize(tmp_path / "r-journal") > 0
    with closing(Registry(str(tmp_path / "r"))) as registry:
        assert len(registry.records) == 500


def test_second_process_is_kept_out(tmp_path: Path) -> None:
    """One daemon, one registry; the refusal changes nothing."""
    with closing(Registry(str(tmp_path / "r"))) as registry:
        program = f"""
from gmemd.persist import registry
registry._BUSY_TIMEOUT = 0
registry.Registry({str(tmp_path / "r")!r})
"""
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
        assert "is in use by another process" in done.stderr
        registry.apply(put=[row_of(record())], last_seq=1)
    assert sorted(os.listdir(tmp_path)) == ["r"]


class TestVersions:
    """Forward only, whole or not at all."""

    @staticmethod
    def add_column(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE objects ADD COLUMN lease TEXT NOT NULL DEFAULT 'none'")

    @staticmethod
    def fail(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE objects")
        raise RuntimeError("power")

    def test_migrated_forward(self, tmp_path: Path) -> None:
        path = str(tmp_path / "r")
        generation = fill(tmp_path / "r")
        with closing(Registry(path, migrations=(*MIGRATIONS, self.add_column))) as registry:
            assert registry.state.version == 2
            assert registry.state.generation == generation
            assert len(registry.records) == 3
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            assert db.execute("SELECT DISTINCT lease FROM objects").fetchall() == [("none",)]
            assert db.execute("PRAGMA application_id").fetchone() == (0x676D656D,)

    def test_failed_migration_changes_nothing(self, tmp_path: Path) -> None:
        fill(tmp_path / "r")
        with pytest.raises(RuntimeError):
            Registry(str(tmp_path / "r"), migrations=(*MIGRATIONS, self.add_column, self.fail))
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert (registry.state.version, len(registry.records)) == (1, 3)

    def test_newer_is_refused_unchanged(self, tmp_path: Path) -> None:
        """The words say what to do; the newer gmemd finds everything."""
        path = tmp_path / "r"
        newer = (*MIGRATIONS, self.add_column)
        fill(path)
        Registry(str(path), migrations=newer).close()
        before = path.read_bytes()
        with pytest.raises(RegistryTooNew, match="schema version 2, this gmemd knows 1: start the gmemd that"):
            Registry(str(path))
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["r"]
        with closing(Registry(str(path), migrations=newer)) as registry:
            assert len(registry.records) == 3

    def test_newer_with_another_state_is_refused_unchanged(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "r")) as db:
            db.execute("CREATE TABLE something_else (a)")
            db.execute("PRAGMA user_version = 7")
        with pytest.raises(RegistryTooNew):
            Registry(str(tmp_path / "r"))

    def test_flipped_version_is_damage_and_not_newer(self, tmp_path: Path) -> None:
        for version in (0, 2, 513):
            path = tmp_path / f"r{version}"
            fill(path)
            with closing(sqlite3.connect(path)) as db:
                db.execute(f"PRAGMA user_version = {version}")
            with closing(Registry(str(path))) as registry:
                assert f"its schema version is {version} in the header and 1 in the state row" in registry.damage
                assert len(registry.records) == 3


class TestDamage:
    """Moved aside, in words, and its intact records are recovered."""

    def test_no_database(self, tmp_path: Path) -> None:
        path = tmp_path / "r"
        path.write_bytes(b"once upon a time" * 1000)
        with closing(Registry(str(path))) as registry:
            assert "is damaged" in registry.damage
            assert registry.records == []
            registry.apply(put=[row_of(record())], last_seq=1)
        assert (tmp_path / "r.damaged-1").read_bytes() == b"once upon a time" * 1000
        with closing(Registry(str(path))) as registry:
            assert (registry.damage, len(registry.records)) == ("", 1)

    def test_another_database(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "r")) as db:
            db.execute("CREATE TABLE birds (name)")
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert "is damaged" in registry.damage

    def test_empty_file_is_new(self, tmp_path: Path) -> None:
        (tmp_path / "r").touch()
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert (registry.damage, registry.records) == ("", [])

    @pytest.mark.parametrize("statement", [
        "UPDATE objects SET size = '4097' WHERE id = 'ram2'",
        "UPDATE objects SET fd_name = 'm-x-1' WHERE id = 'ram2'",
        "UPDATE objects SET seq = 77 WHERE id = 'ram2'",
    ])  # fmt: skip
    def test_changed_row(self, tmp_path: Path, statement: str) -> None:
        """What SQLite itself cannot see is seen by the checksum; the other rows are sound."""
        fill(tmp_path / "r")
        with closing(sqlite3.connect(tmp_path / "r", isolation_level=None)) as db:
            db.execute(statement)
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert "the checksum of object 'ram2' is wrong" in registry.damage
            assert [sound.id for sound in registry.records] == ["ram1", "ram3"]

    @pytest.mark.parametrize("statement", [
        "UPDATE state SET last_seq = 1", "UPDATE state SET removing = 'm-x-1'", "DELETE FROM state",
        "UPDATE state SET generation = 'other'",
    ])  # fmt: skip
    def test_changed_state(self, tmp_path: Path, statement: str) -> None:
        generation = fill(tmp_path / "r")
        with closing(sqlite3.connect(tmp_path / "r", isolation_level=None)) as db:
            db.execute(statement)
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert registry.damage
            assert len(registry.records) == 3
            assert registry.state.generation != generation

    def test_any_flipped_bit_and_any_cut(self, tmp_path: Path) -> None:
        """Never an exception but QmpError, never a false record, and the new registry works."""
        original = tmp_path / "original"
        fill(original, 20)
        data = original.read_bytes()
        truth = {n: record(n) for n in range(1, 21)}
        random = Random(3)
        spots = [*range(0, 100, 7), *(random.randrange(len(data)) for _ in range(150))]
        damaged = [data[:spot] + bytes([data[spot] ^ 1 << random.randrange(8)]) + data[spot + 1 :] for spot in spots]
        damaged += [data[: random.randrange(len(data))] for _ in range(30)]
        for number, content in enumerate(damaged):
            path = tmp_path / str(number)
            path.write_bytes(content)
            try:
                with closing(Registry(str(path))) as registry:
                    assert all(truth[found.seq] == found for found in registry.records)
                    assert registry.damage or len(registry.records) == 20 or not content
                    registry.apply(put=[row_of(record(99))], last_seq=99)
            except RegistryTooNew:
                pytest.fail("a flipped bit is no newer version")

    def test_a_schema_that_is_no_text(self, tmp_path: Path) -> None:
        """SQLite quotes it in words that are no UTF-8: damage like any other."""
        path = tmp_path / "r"
        Registry(str(path)).close()
        path.write_bytes(path.read_bytes().replace(b"CREATE TABLE objects", b"CREATE T\xccBLE objects"))
        with closing(Registry(str(path))) as registry:
            assert "is damaged (its schema is not text)" in registry.damage

    def test_ten_damages(self, tmp_path: Path) -> None:
        """Ten copies are kept, the last is overwritten."""
        for number in range(12):
            (tmp_path / "r").write_bytes(b"%d" % number * 1000)
            Registry(str(tmp_path / "r")).close()
        assert len(os.listdir(tmp_path)) == 11
        assert (tmp_path / "r.damaged-10").read_bytes() == b"11" * 1000


class TestNotWritable:
    """Read-only with the reason, and well again when the reason is gone."""

    def test_no_directory(self, tmp_path: Path) -> None:
        with closing(Registry(str(tmp_path / "none" / "r"))) as registry:
            assert "unable to open" in registry.read_only
            with pytest.raises(NotWritten, match="unable to open"):
                registry.apply(put=[row_of(record())], last_seq=1)

    def test_full_disk_at_start(self, tmp_path: Path) -> None:
        """What is there is read."""
        fill(tmp_path / "r")
        with full_disk():
            registry = Registry(str(tmp_path / "r"))
            assert registry.read_only
            assert len(registry.records) == 3
            assert not registry.reopen()
        assert registry.reopen()
        registry.apply(put=[row_of(record(4))], last_seq=4)
        registry.close()

    def test_full_disk_and_damage(self, tmp_path: Path) -> None:
        """The damaged file stays where it is, its intact records are handed out."""
        fill(tmp_path / "r")
        with closing(sqlite3.connect(tmp_path / "r", isolation_level=None)) as db:
            db.execute("UPDATE objects SET size = 'x' WHERE id = 'ram2'")
        with full_disk(), closing(Registry(str(tmp_path / "r"))) as registry:
            assert "is damaged" in registry.damage
            assert registry.read_only
            assert [sound.id for sound in registry.records] == ["ram1", "ram3"]
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert registry.damage
            assert not registry.read_only
            assert [sound.id for sound in registry.records] == ["ram1", "ram3"]

    def test_full_disk_in_a_transaction(self, tmp_path: Path) -> None:
        """It did not happen, and the next one does."""
        fill(tmp_path / "r")
        with closing(Registry(str(tmp_path / "r"))) as registry:
            with full_disk():
                with pytest.raises(NotWritten, match=r"Input/output error \(SQLITE_IOERR_WRITE\)"):
                    registry.apply(delete=["ram1"], removing={"m-x-1"}, last_seq=3)
                assert not registry.recover()
                assert registry.read_only
            assert registry.reopen()
            assert registry.state.removing == ()
            registry.apply(delete=["ram1"], removing={"m-x-1"}, last_seq=3)

    def test_no_space(self, tmp_path: Path) -> None:
        """ENOSPC in its own words, and the next transaction fits."""
        fill(tmp_path / "r")
        with closing(Registry(str(tmp_path / "r"))) as registry:
            assert registry._db is not None
            registry._db.execute("PRAGMA max_page_count = 3")
            with pytest.raises(NotWritten, match=r"No space left on device \(SQLITE_FULL\)"):
                registry.apply(put=[row_of(record(n)) for n in range(50)], last_seq=50)
            assert not registry.recover()
            registry.apply(put=[row_of(record(n)) for n in range(50)], last_seq=50)

    def test_recover_tells_what_happened(self, tmp_path: Path) -> None:
        """An error after the commit hides a success."""
        path = str(tmp_path / "r")
        with closing(Registry(path)) as registry:
            registry.apply(put=[row_of(record(1))], last_seq=1)
            assert registry.recover()
            registry.apply(delete=["ram1"], removing={"m-x-1"}, last_seq=1)
            assert registry.recover()
            registry.state = registry.state._replace(commits=7)
            with pytest.raises(NotWritten):
                registry.apply(put=[(1,)], delete=["ram1"], last_seq=2)
            assert not registry.recover()

    @pytest.mark.parametrize(("numbers", "delete"), [((1, 2), []), ((1,), ["ram3"])], ids=["put", "delete"])
    def test_recover_looks_at_all_of_it(self, tmp_path: Path, numbers: tuple[int, ...], delete: list[str]) -> None:
        """A row that was to become what it is already does not show that the rest was written."""
        with closing(Registry(str(tmp_path / "r"))) as registry:
            registry.apply(put=[row_of(record(1)), row_of(record(3))], last_seq=3)
            assert registry._db is not None
            registry._db.execute("PRAGMA query_only = 1")
            with pytest.raises(NotWritten):
                registry.apply(put=[row_of(record(number)) for number in numbers], delete=delete, last_seq=3)
            assert not registry.recover()

    def test_removed_under_us(self, tmp_path: Path) -> None:
        """The file is put back, whole, before the next transaction."""
        path = tmp_path / "r"
        fill(path)
        with closing(Registry(str(path))) as registry:
            generation = registry.state.generation
            path.unlink()
            registry.apply(put=[row_of(record(4))], last_seq=4)
            assert registry.state.generation == generation
        with closing(Registry(str(path))) as registry:
            assert (registry.state.generation, len(registry.records)) == (generation, 4)

    def test_removed_with_its_directory(self, tmp_path: Path) -> None:
        """Nothing is written while it cannot be restored; nothing is forgotten either."""
        directory = tmp_path / "run"
        directory.mkdir()
        fill(directory / "r")
        with closing(Registry(str(directory / "r"))) as registry:
            shutil.rmtree(directory)
            for _ in range(2):
                with pytest.raises(NotWritten, match="it was removed and cannot be restored: unable to open"):
                    registry.apply(put=[row_of(record(4))], last_seq=4)
                assert not registry.recover()
            directory.mkdir()
            registry.apply(put=[row_of(record(5))], last_seq=5)
        with closing(Registry(str(directory / "r"))) as registry:
            assert [record.seq for record in registry.records] == [1, 2, 3, 5]

    def test_replaced_under_us(self, tmp_path: Path) -> None:
        """Somebody else's file is left alone."""
        path = tmp_path / "r"
        fill(path)
        fill(tmp_path / "other", 1)
        with closing(Registry(str(path))) as registry:
            os.replace(tmp_path / "other", path)
            with pytest.raises(NotWritten, match="it was replaced by another file"):
                registry.apply(put=[row_of(record(4))], last_seq=4)
        with closing(Registry(str(path))) as registry:
            assert len(registry.records) == 1

    def test_another_file_in_its_place_is_not_taken_for_it(self, tmp_path: Path) -> None:
        path = str(tmp_path / "r")
        fill(tmp_path / "other")
        with closing(Registry(path)) as registry:
            shutil.copy(tmp_path / "other", path)
            assert not registry.reopen()
            assert registry.read_only == "it is not the file that was opened at start"

    def test_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "r").mkdir()
        with pytest.raises(QmpError, match="cannot be read"):
            Registry(str(tmp_path / "r"))

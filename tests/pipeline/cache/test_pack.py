"""Packing: fewer files, and the same rows for every reader at every moment."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.data.makers import SAMPLING, SCORING, signal_row
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, list_cache, pack_cache, verify_cache
from adpa.data.cache import shards
from adpa.data.cache.compact import compact_schema, compact_table
from adpa.data.cache.files import remove_file
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.samples import SampleRequest, read_samples, write_samples
from adpa.data.cache.shards import list_shards, peek_keys, peek_shard, read_shard, write_replacement, write_shard
from adpa.data.cache.signal_rows import SignalRow, plain_schema, plain_table
from adpa.data.cache.signals import (
    Scoring,
    SignalTable,
    read_scorings,
    read_signals,
    write_scoring,
    write_signals,
)
from adpa.errors import CacheError, DamagedFileError, OptionError
from adpa.pipeline.cache import pack as cache_pack
from adpa.pipeline.cache.pack import pack_folder

SCHEMA = compact_schema(SCORING.top_k, SCORING.lossy)


def as_it_is(table: pa.Table) -> Iterator[pa.Table]:
    yield table


def row(key: int, version: int = 0) -> SignalRow:
    """A row of a key; versions of it differ, as those of two runs do."""
    return signal_row(bytes([key]) * 16, 1 + key % 4, seed=10 * key + version)


def long_row(key: int, version: int = 0) -> SignalRow:
    """A row larger than the rest of its file, so that few of them reach a goal."""
    return signal_row(bytes([key]) * 16, 250, seed=10 * key + version)


def seen(table: SignalTable) -> dict[bytes, SignalRow]:
    """The rows that readers use: one for each key."""
    keys = sorted(table.keys())
    numbers = table.locate(pa.array(keys, pa.binary(16)))
    return {key: table.row(int(number)) for key, number in zip(keys, numbers, strict=True)}


def same(left: dict[bytes, SignalRow], right: dict[bytes, SignalRow]) -> bool:
    def columns(row: SignalRow) -> list[tuple[Any, Any]]:
        arrays: list[NDArray[Any]] = [value for name, value in vars(row).items() if name != "key"]
        return [(array.dtype, array.tobytes()) for array in arrays]

    return left.keys() == right.keys() and all(columns(left[key]) == columns(right[key]) for key in left)


def fill(cache: Path, scoring: Scoring, parts: list[list[SignalRow]]) -> dict[bytes, SignalRow]:
    """Writes files of rows; returns the rows that readers use."""
    write_scoring(cache, scoring)
    for part in parts:
        write_signals(cache, scoring, part)
    return seen(read_signals(cache, scoring))


def count(cache: Path) -> int:
    return len(list_shards((cache / "scorings" / SCORING.id), "signals"))


def test_a_real_cache_is_packed_and_says_the_same(filled: Filled, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(filled.cache, tmp_path / "cache"))
    (scoring,) = read_scorings(cache)
    before, listing = seen(read_signals(cache, scoring)), list_cache(cache)
    (sampling,) = (one.info.sampling for one in read_response_sets(cache) if one.info.sampling)
    samples = {key: ids.tolist() for key, ids in read_samples(cache, sampling).items()}
    (packed,) = (one for one in pack_cache(cache).packed if one.folder == f"scorings/{scoring.id}")
    assert (packed.files_before, packed.files, packed.repeated) == (listing.scorings[0].shards, 1, 0)
    assert packed.bytes < packed.bytes_before
    assert same(seen(read_signals(cache, scoring)), before)
    assert {key: ids.tolist() for key, ids in read_samples(cache, sampling).items()} == samples
    assert verify_cache(cache).faults == []
    again = pack_cache(cache)
    assert (again.packed, again.untouched) == ([], 2)


versions = st.tuples(st.integers(0, 12), st.integers(0, 2))
parts_of_rows = st.lists(st.lists(versions, min_size=1, max_size=5), min_size=1, max_size=8)


@given(parts_of_rows, st.sampled_from([1, 400, 1500, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_packing_changes_no_row_that_readers_see_and_once_is_enough(
    parts: list[list[tuple[int, int]]], goal: int
) -> None:
    with TemporaryDirectory() as folder:
        cache = Path(folder)
        before = fill(cache, SCORING, [[row(*version) for version in part] for part in parts])
        rows, files = len(read_signals(cache, SCORING)), count(cache)
        packed = pack_folder((cache / "scorings" / SCORING.id), "signals", SCHEMA, as_it_is, goal)
        table = read_signals(cache, SCORING)
        assert same(seen(table), before)
        assert len(table) == len(before), "every key stands once"
        assert (packed.repeated if packed else 0) == rows - len(before)
        assert count(cache) <= files
        assert pack_folder((cache / "scorings" / SCORING.id), "signals", SCHEMA, as_it_is, goal) is None


class Killed(BaseException):
    pass


@given(parts_of_rows, st.sampled_from([400, 1 << 20]), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_a_kill_at_any_moment_changes_no_row_that_readers_see(
    parts: list[list[tuple[int, int]]], goal: int, moment: int
) -> None:
    """After a number of files have been written or removed."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cache = Path(folder)
        before = fill(cache, SCORING, [[row(*version) for version in part] for part in parts])
        left = [moment]

        def counted(work: Any) -> Any:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                result = work(*arguments, **options)
                assert same(seen(read_signals(cache, SCORING)), before)
                return result

            return wrapper

        with patch.context() as inner:
            inner.setattr(cache_pack, "write_replacement", counted(write_replacement))
            inner.setattr(cache_pack, "remove_file", counted(remove_file))
            with suppress(Killed):
                pack_folder((cache / "scorings" / SCORING.id), "signals", SCHEMA, as_it_is, goal)
        assert same(seen(read_signals(cache, SCORING)), before)
        pack_folder((cache / "scorings" / SCORING.id), "signals", SCHEMA, as_it_is, goal)
        assert same(seen(read_signals(cache, SCORING)), before)
        assert len(read_signals(cache, SCORING)) == len(before)


def test_files_near_the_goal_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, SCORING, [[row(key) for key in range(20)], [row(30)], [row(31)]])
    folder = tmp_path / "scorings" / SCORING.id
    large = max(folder.glob("signals-*"), key=lambda path: path.stat().st_size)
    size = large.stat().st_size
    packed = pack_folder(folder, "signals", SCHEMA, as_it_is, goal=2 * size)
    assert packed is not None
    assert (packed.files_before, packed.files) == (3, 2)
    assert large.exists()


def test_new_files_are_about_as_large_as_the_goal(tmp_path: Path) -> None:
    fill(tmp_path, SCORING, [[signal_row(bytes([key]) * 16, 999, seed=key)] for key in range(60)])
    folder = tmp_path / "scorings" / SCORING.id
    goal = 4 * max(path.stat().st_size for path in folder.glob("signals-*"))
    packed = pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
    assert packed is not None
    assert 10 <= packed.files <= 15
    sizes = sorted(path.stat().st_size for path in folder.glob("signals-*"))
    assert all(goal <= size <= 2 * goal for size in sizes[1:]), "all but the last"


def test_plain_files_of_version_1_are_written_in_the_newest_encoding(tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    rows = [row(key) for key in range(5)]
    folder = tmp_path / "scorings" / SCORING.id
    write_shard(folder, "signals", plain_table(rows[:2], plain_schema(SCORING.top_k)))
    write_signals(tmp_path, SCORING, rows[2:])
    (tmp_path / "responses").mkdir()
    (packed,) = pack_cache(tmp_path).packed
    (path,) = folder.glob("signals-*")
    assert (packed.files_before, packed.files) == (2, 1)
    assert peek_shard(path).schema.equals(SCHEMA, check_metadata=True)
    assert same(seen(read_signals(tmp_path, SCORING)), {one.key: one for one in rows})


def test_samples_are_packed_and_the_first_of_two_stays(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    requests = [SampleRequest(np.array([n], dtype=np.int32), 0) for n in range(6)]
    for start, token in ((0, 7), (2, 8), (3, 9)):
        part = requests[start : start + 3]
        write_samples(tmp_path, SAMPLING, part, [np.array([token, n], dtype=np.int32) for n in range(len(part))])
    before = {key: ids.tolist() for key, ids in read_samples(tmp_path, SAMPLING).items()}
    (packed,) = pack_cache(tmp_path).packed
    assert (packed.files_before, packed.files, packed.repeated) == (3, 1, 3)
    assert {key: ids.tolist() for key, ids in read_samples(tmp_path, SAMPLING).items()} == before


def test_a_damaged_file_stops_it_and_nothing_is_lost(tmp_path: Path) -> None:
    fill(tmp_path, SCORING, [[row(key)] for key in range(4)])
    (tmp_path / "responses").mkdir()
    paths = list_shards((tmp_path / "scorings" / SCORING.id), "signals")
    content = bytearray(paths[2].read_bytes())
    content[-100] ^= 1
    paths[2].write_bytes(bytes(content))
    with pytest.raises(DamagedFileError, match=paths[2].name):
        pack_cache(tmp_path)
    assert list_shards((tmp_path / "scorings" / SCORING.id), "signals") == paths


def test_the_work_for_many_files_grows_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a file are measured once, for any number of later files."""
    fill(tmp_path, SCORING, [[row(key)] for key in range(40)])
    measured = []

    class Measured:
        """The part of a table that packing uses."""

        def __init__(self, table: pa.Table) -> None:
            self.table, self.schema = table, table.schema

        def __len__(self) -> int:
            return len(self.table)

        def filter(self, mask: pa.Array) -> "Measured":
            return Measured(self.table.filter(mask))

        @property
        def nbytes(self) -> int:
            measured.append(self)
            return int(self.table.nbytes)

    class Arrow:
        array = staticmethod(pa.array)
        binary, chunked_array = staticmethod(pa.binary), staticmethod(pa.chunked_array)

        @staticmethod
        def concat_tables(tables: list[Measured]) -> pa.Table:
            return pa.concat_tables([table.table for table in tables])

    monkeypatch.setattr(cache_pack, "read_shard", lambda path: Measured(read_shard(path)))
    monkeypatch.setattr(cache_pack, "pa", Arrow)
    packed = pack_folder(tmp_path / "scorings" / SCORING.id, "signals", SCHEMA, as_it_is)
    assert packed is not None
    assert packed.files == 1
    assert len(measured) == 40


def full_after(files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the disk full after a number of written files."""
    written: list[Location] = []

    def write(*arguments: Any) -> Location:
        if len(written) == files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write_replacement(*arguments))
        return written[-1]

    monkeypatch.setattr(cache_pack, "write_replacement", write)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("files", [0, 1, 2])
@pytest.mark.parametrize("repeated", [False, True])
def test_on_a_full_disk_the_cache_gets_no_larger_and_the_next_time_goes_on(
    files: int, repeated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files without a shared row go as soon as a new file has their rows; otherwise the new files go again."""
    parts = [[long_row(key), *([long_row(key + 1, 1)] if repeated else [])] for key in range(20)]
    before = fill(tmp_path, SCORING, parts)
    folder = tmp_path / "scorings" / SCORING.id
    room, count_before = size(folder), count(tmp_path)
    goal = 3 * room // count_before
    with monkeypatch.context() as patch:
        full_after(files, patch)
        with pytest.raises(OSError, match="No space left"):
            pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
    assert size(folder) <= room
    assert count(tmp_path) == count_before if repeated or files == 0 else count(tmp_path) < count_before
    assert same(seen(read_signals(tmp_path, SCORING)), before)
    pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
    assert same(seen(read_signals(tmp_path, SCORING)), before)
    assert len(read_signals(tmp_path, SCORING)) == len(before)


@pytest.mark.slow
@given(parts_of_rows, st.sampled_from([400, 20_000, 1 << 20]), st.integers(0, 40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_second_pack_at_any_moment_of_the_first_loses_nothing(
    parts: list[list[tuple[int, int]]], goal: int, moment: int, full: bool
) -> None:
    """The second one runs whole, or until the disk is full, before any one call of the first one."""
    with TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        cache = Path(temporary)
        before = fill(cache, SCORING, [[long_row(*version) for version in part] for part in parts])
        folder, left = cache / "scorings" / SCORING.id, [moment]

        def disturbed(work: Any) -> Any:
            def wrapper(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    with pytest.MonkeyPatch.context() as inner, suppress(OSError):
                        if full:
                            full_after(1, inner)
                        pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
                assert same(seen(read_signals(cache, SCORING)), before)
                return work(*arguments)

            return wrapper

        for work in (peek_keys, peek_shard, read_shard, write_replacement, remove_file):
            patch.setattr(cache_pack, work.__name__, disturbed(work))
        pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
        assert same(seen(read_signals(cache, SCORING)), before)
        pack_folder(folder, "signals", SCHEMA, as_it_is, goal)
        assert len(read_signals(cache, SCORING)) == len(before)


def test_a_link_to_nothing_is_told_and_no_loop(tmp_path: Path) -> None:
    fill(tmp_path, SCORING, [[row(1)], [row(2)]])
    (tmp_path / "responses").mkdir()
    link = tmp_path / "scorings" / SCORING.id / "signals-0.arrow"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CacheError, match=r"a listed file is missing: .*signals-0\.arrow"):
        pack_cache(tmp_path)


def test_a_table_that_is_open_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SMALL_FILE", 0)  # so that these are mapped like large ones
    before = fill(tmp_path, SCORING, [[row(key)] for key in range(4)])
    (tmp_path / "responses").mkdir()
    table = read_signals(tmp_path, SCORING)
    pack_cache(tmp_path)
    assert same(seen(table), before)


def test_the_command_says_what_became_of_the_files(tmp_path: Path) -> None:
    fill(tmp_path, SCORING, [[row(key), row(9)] for key in range(3)])
    (tmp_path / "responses").mkdir()
    done = CliRunner().invoke(cli.app, ["cache", "pack", str(tmp_path)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "packed well" not in done.stdout, "there is no other folder"
    text = " ".join(done.stdout.split())
    assert re.fullmatch(
        rf"scorings/{SCORING.id} 3 files of [\d,]+ bytes became 1 file of [\d,]+ bytes; 2 repeated rows dropped", text
    )
    assert CliRunner().invoke(cli.app, ["cache", "pack", str(tmp_path)]).stdout == "1 folder is packed well\n"


def test_the_command_says_that_there_is_nothing_to_pack(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    assert CliRunner().invoke(cli.app, ["cache", "pack", str(tmp_path)]).stdout == "nothing to pack\n"


def test_no_cache_and_one_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        pack_cache(tmp_path)
    prepare_cache(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OptionError, match=r"CACHE .*cannot be written"):
        pack_cache(tmp_path)


def test_a_scoring_without_files_is_left_alone(tmp_path: Path) -> None:
    write_scoring(tmp_path, replace(SCORING, top_k=1))
    (tmp_path / "responses").mkdir()
    assert pack_cache(tmp_path).packed == []


def test_what_readers_refuse_is_not_packed_into_what_they_accept(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    write_scoring(tmp_path, SCORING)
    rows = [signal_row(bytes([number]) * 16, 2, seed=number) for number in range(2)]
    lossy = compact_table(rows[:1], SCORING.top_k, lossy=True)
    write_signals(tmp_path, SCORING, rows[1:])
    path = write_shard(SCORING.folder(tmp_path), "signals", lossy)
    with pytest.raises(DamagedFileError, match="not those of its scoring's signals"):
        pack_cache(tmp_path)
    assert path.exists()


def test_samples_that_readers_refuse_stop_it(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    write_samples(tmp_path, SAMPLING, [SampleRequest(np.array([1], dtype=np.int32), 0)], [np.array([7], np.int32)])
    (path,) = (tmp_path / "samples").rglob("*.arrow")
    table = read_shard(path)
    more = write_shard(path.parent, "samples", table.append_column("more", pa.array([1])))
    with pytest.raises(DamagedFileError, match=f"{more.name}: damaged: its columns are not those of samples"):
        pack_cache(tmp_path)
    more.unlink()
    write_shard(path.parent, "samples", table.replace_schema_metadata({"made": "elsewhere"}))
    assert [packed.files for packed in pack_cache(tmp_path).packed] == [1]
    assert pack_cache(tmp_path).packed == [], "metadata that says nothing is left out"

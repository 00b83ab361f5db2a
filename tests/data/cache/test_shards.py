import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import load_dataset

from adpa.data.cache import shards
from adpa.data.cache.files import remove_file
from adpa.data.cache.shards import (
    list_shards,
    peek_keys,
    read_shard,
    read_shards,
    serialize,
    write_replacement,
    write_shard,
)
from adpa.errors import CacheError, DamagedFileError

TABLE = pa.table({"key": pa.array([b"a" * 16, b"b" * 16], pa.binary(16)), "ids": [[1, 2, 3], []]})
OTHER_TABLE = pa.table({"key": pa.array([b"c" * 16], pa.binary(16)), "ids": [[4]]})


def test_a_shard_is_named_by_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "new" / "folder", "signals", TABLE)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    assert path == tmp_path / "new" / "folder" / f"signals-{digest}.arrow"


def test_a_shard_comes_back(tmp_path: Path) -> None:
    assert read_shard(write_shard(tmp_path, "signals", TABLE)).equals(TABLE, check_metadata=True)


def test_a_shard_without_rows_comes_back(tmp_path: Path) -> None:
    assert read_shard(write_shard(tmp_path, "signals", TABLE.slice(0, 0))).equals(TABLE.slice(0, 0))


def test_a_table_in_pieces_is_the_same_shard(tmp_path: Path) -> None:
    pieces = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    assert write_shard(tmp_path, "signals", pieces) == write_shard(tmp_path, "signals", TABLE)


def test_a_folder_is_read_whole_and_without_what_is_not_a_shard(tmp_path: Path) -> None:
    paths = [write_shard(tmp_path, "signals", table) for table in (TABLE, OTHER_TABLE)]
    write_shard(tmp_path, "others", TABLE)
    (tmp_path / "scoring.json").write_text("{}")
    (tmp_path / ".signals-0.arrow.unfinished").write_text("half")
    assert list_shards(tmp_path, "signals") == sorted(paths)
    assert sorted(table.num_rows for table in read_shards(tmp_path, "signals")) == [1, 2]


def test_a_folder_that_is_not_there_has_no_shards(tmp_path: Path) -> None:
    assert list_shards(tmp_path / "nowhere", "signals") == []


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "signals", TABLE)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(DamagedFileError):
            read_shard(path)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_found(kept: int, tmp_path: Path) -> None:
    path = write_shard(tmp_path, "signals", TABLE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedFileError) as caught:
        read_shard(path)
    assert str(caught.value).startswith(f"{path}: damaged: ")
    assert caught.value.exit_code == 1


def test_a_shard_under_another_name_is_found(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "signals", TABLE)
    other = write_shard(tmp_path, "signals", OTHER_TABLE)
    with pytest.raises(DamagedFileError):
        read_shard(Path(str(path)).replace(str(other)))


@pytest.mark.parametrize("step", ["os.open", "os.write", "os.fsync", "os.rename"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing_behind(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(failure)):
        write_shard(tmp_path, "signals", TABLE)
    assert list(tmp_path.iterdir()) == []


def start_python(program: str, folder: Path) -> "subprocess.Popen[str]":
    """Starts a process that runs ``program`` with ``folder`` and ``table`` at hand."""
    beginning = f"""
from pathlib import Path
import pyarrow as pa
from adpa.data.cache.shards import write_shard
folder, table = Path({str(folder)!r}), pa.table({{"ids": [[1, 2, 3], []]}})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", beginning + program], env=environment, text=True, stderr=subprocess.PIPE
    )


def test_a_disk_that_takes_no_more_leaves_nothing_behind(tmp_path: Path) -> None:
    process = start_python(
        """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # no file may grow beyond 100 bytes
write_shard(folder, "signals", table)
""",
        tmp_path,
    )
    assert "OSError: [Errno 27] File too large" in process.communicate()[1]
    assert list(tmp_path.iterdir()) == []


def test_a_shard_opens_with_plain_pyarrow(tmp_path: Path) -> None:
    with pa.memory_map(str(write_shard(tmp_path, "signals", TABLE))) as file:
        assert pa.ipc.open_file(file).read_all().equals(TABLE)


def test_shards_open_with_datasets(tmp_path: Path) -> None:
    for table in (TABLE, OTHER_TABLE):
        write_shard(tmp_path / "shards", "signals", table)
    files = [str(path) for path in list_shards(tmp_path / "shards", "signals")]
    dataset = load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "datasets"))
    rows = TABLE.to_pylist() + OTHER_TABLE.to_pylist()
    assert sorted(dataset, key=lambda row: row["key"]) == rows


def test_two_processes_that_write_the_same_rows_make_one_file(tmp_path: Path) -> None:
    program = "for _ in range(50): write_shard(folder, 'signals', table)"
    processes = [start_python(program, tmp_path) for _ in range(2)]
    assert [process.communicate()[1] for process in processes] == ["", ""]
    (path,) = tmp_path.iterdir()
    assert read_shard(path).to_pydict() == {"ids": [[1, 2, 3], []]}


Listing = Callable[[Path, str], list[Path]]


def interfere(monkeypatch: pytest.MonkeyPatch, change: Callable[[Listing, Path, str], list[Path]]) -> None:
    """Lets another process change the folder while it is listed for the first time."""
    listing: Listing = shards.list_shards  # type: ignore[assignment]

    def list_first(folder: Path, prefix: str = "") -> list[Path]:
        monkeypatch.setattr(shards, "list_shards", listing)
        return change(listing, folder, prefix)

    monkeypatch.setattr(shards, "list_shards", list_first)


def pack(folder: Path) -> None:
    """Writes one shard with the rows of all, then removes the others."""
    small = list_shards(folder, "signals")
    write_shard(folder, "signals", pa.concat_tables([read_shard(path) for path in small]))
    for path in small:
        remove_file(path)


def rows_of(folder: Path) -> set[bytes]:
    return {key for table in read_shards(folder, "signals") for key in table["key"].to_pylist()}


def test_shards_that_another_process_packs_after_they_were_listed_are_read_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(listing: Listing, folder: Path, prefix: str) -> list[Path]:
        listed = listing(folder, prefix)
        pack(folder)
        return listed

    for table in (TABLE, OTHER_TABLE):
        write_shard(tmp_path, "signals", table)
    interfere(monkeypatch, change)
    assert rows_of(tmp_path) == {b"a" * 16, b"b" * 16, b"c" * 16}
    assert len(list_shards(tmp_path, "signals")) == 1


def test_a_listing_that_saw_neither_the_packed_file_nor_its_parts_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(listing: Listing, folder: Path, prefix: str) -> list[Path]:
        listed = listing(folder, prefix)
        pack(folder)
        return listed[:1]

    for table in (TABLE, OTHER_TABLE, TABLE.slice(1)):
        write_shard(tmp_path, "signals", table)
    interfere(monkeypatch, change)
    assert rows_of(tmp_path) == {b"a" * 16, b"b" * 16, b"c" * 16}


def test_a_shard_that_its_owner_removes_after_it_was_listed_is_no_longer_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(listing: Listing, folder: Path, prefix: str) -> list[Path]:
        listed = listing(folder, prefix)
        path.unlink()
        return listed

    write_shard(tmp_path, "signals", OTHER_TABLE)
    path = Path(str(write_shard(tmp_path, "signals", TABLE)))
    interfere(monkeypatch, change)
    assert rows_of(tmp_path) == {b"c" * 16}


def test_a_folder_that_is_removed_after_it_was_listed_has_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(listing: Listing, folder: Path, prefix: str) -> list[Path]:
        listed = listing(folder, prefix)
        shutil.rmtree(folder)
        return listed

    write_shard(tmp_path / "scoring", "signals", TABLE)
    interfere(monkeypatch, change)
    assert rows_of(tmp_path / "scoring") == set()


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path, "signals", TABLE)
    (tmp_path / "signals-0.arrow").symlink_to("nowhere")
    with pytest.raises(CacheError) as caught:
        rows_of(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'signals-0.arrow'}: listed, but missing; ")


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", deny)
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}'"):
        rows_of(tmp_path)


def disguise(folder: Path, payload: bytes) -> Path:
    """A file under the name that its bytes should have."""
    path = folder / f"signals-{hashlib.blake2b(payload, digest_size=16).hexdigest()}.arrow"
    path.write_bytes(payload)
    return path


@pytest.mark.parametrize("value", [1 << 60, (1 << 62) + 1, (1 << 64) - 1, 1 << 40])
def test_absurd_sizes_under_the_right_digest_are_refused(value: int, tmp_path: Path) -> None:
    """Every 64-bit number of a file in turn: either it means nothing, or the file is refused without a crash."""
    payload = serialize(OTHER_TABLE).to_pybytes()
    refused = 0
    for place in range(0, len(payload) - 7, 8):
        path = disguise(tmp_path, payload[:place] + value.to_bytes(8, "little") + payload[place + 8 :])
        try:
            read_shard(path).to_pydict()
        except DamagedFileError:
            refused += 1
        except UnicodeDecodeError:
            pass  # the name of a column
    assert refused > 10


def test_a_file_that_says_its_rows_are_compressed_to_nothing_is_refused(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    zeros = pa.table({"ids": pa.array([0] * 100_000, pa.int64())})
    with pa.ipc.new_file(sink, zeros.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(zeros)
    payload = sink.getvalue().to_pybytes()
    size = (800_000).to_bytes(8, "little")
    assert payload.count(size) >= 1
    with pytest.raises(DamagedFileError):
        read_shard(disguise(tmp_path, payload.replace(size, (1 << 60).to_bytes(8, "little"))))


KEYS = pa.array([b"a" * 16, b"b" * 16], pa.binary(16))


@pytest.mark.parametrize(
    "columns",
    [
        {"ids": KEYS},
        {"key": KEYS.cast(pa.binary())},
        {"key": ["a", "b"]},
        {"key": pa.array([b"a" * 16, None], pa.binary(16))},
    ],
    ids=["no key", "keys of any length", "strings", "a row without a key"],
)
def test_a_file_without_keys_is_damaged(columns: dict[str, pa.Array], tmp_path: Path) -> None:
    path = write_shard(tmp_path, "signals", pa.table(columns))
    with pytest.raises(DamagedFileError) as caught:
        peek_keys(path)
    assert str(caught.value).startswith(f"{path}: damaged: it has no column of keys; ")
    assert peek_keys(write_shard(tmp_path, "signals", TABLE)).equals(TABLE["key"])


def test_a_replacement_has_a_name_that_no_other_file_has(tmp_path: Path) -> None:
    paths = [write_replacement(tmp_path, "signals", TABLE) for _ in range(2)]
    assert len({*paths, write_shard(tmp_path, "signals", TABLE)}) == 3
    for path in paths:
        assert read_shard(path).equals(TABLE, check_metadata=True)
    assert load_dataset("arrow", data_files=str(paths[0]), split="train", cache_dir=str(tmp_path / "c")).num_rows == 2

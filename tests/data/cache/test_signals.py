import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.data.makers import SCORING, K, assert_same_row, signal_row, teacher_row

from adpa.data.cache.compact import compact_table
from adpa.data.cache.documents import write_document
from adpa.data.cache.files import write_file
from adpa.data.cache.shards import list_shards, write_shard
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.data.cache.signals import (
    ModelIdentity,
    SignalTable,
    peek_signals,
    read_scoring,
    read_scorings,
    read_signals,
    write_scoring,
    write_signals,
)
from adpa.errors import CacheError, DamagedFileError

KEYS = [bytes([number]) * 16 for number in range(8)]
ARRAYS = [field.name for field in fields(SignalRow) if field.name != "key"]
ADVANTAGES = ["token_advantages", "topk_advantages"]


def as_keys(keys: list[bytes]) -> pa.Array:
    return pa.array(keys, pa.binary(16))


@pytest.mark.parametrize("reference", [True, False], ids=["with a reference", "without a reference"])
def test_rows_come_back_from_the_cache_bit_for_bit(reference: bool, tmp_path: Path) -> None:
    rows = [signal_row(key, length, seed=length, reference=reference) for length, key in enumerate(KEYS)]
    write_signals(tmp_path, SCORING, rows)
    table = read_signals(tmp_path, SCORING)
    for number, row in zip(table.locate(as_keys(KEYS)), rows, strict=True):
        assert_same_row(table.row(int(number)), row)


def test_extreme_numbers_come_back(tmp_path: Path) -> None:
    """An empty tail is −inf; log-probabilities and advantages must fit into the range of float16."""
    row = SignalRow(
        key=KEYS[0],
        token_logprobs=np.array([-0.0, -1e30], np.float32),
        topk_ids=np.array([[0, 1, 2**31 - 1]] * 2, np.int32),
        topk_logprobs=np.array([[0, -6e-8, -65504], [-0.0, -1, -np.inf]], np.float16),
        tail_logprob=np.array([-np.inf, -1e-45], np.float32),
        token_advantages=np.array([1e30, -1e30], np.float32),
        topk_advantages=np.array([[65504, -65504, 6e-8]] * 2, np.float16),
    )
    write_signals(tmp_path, SCORING, [row])
    assert_same_row(read_signals(tmp_path, SCORING).row(0), row)


def test_rows_of_several_shards_are_found_by_key(tmp_path: Path) -> None:
    rows = {key: signal_row(key, length=number, seed=number) for number, key in enumerate(KEYS[:7])}
    for shard in (KEYS[4:7], KEYS[:1], KEYS[1:4]):
        write_signals(tmp_path, SCORING, [rows[key] for key in shard])
    assert len(list_shards(SCORING.folder(tmp_path), "signals")) == 3
    table = read_signals(tmp_path, SCORING)
    missing = KEYS[7]
    requested = [KEYS[3], missing, KEYS[0], KEYS[6], KEYS[3], missing]
    numbers = table.locate(as_keys(requested))
    assert numbers.dtype == np.int64
    assert (numbers < 0).tolist() == [False, True, False, False, False, True]
    for key, number in zip(requested, numbers, strict=True):
        if key != missing:
            assert_same_row(table.row(int(number)), rows[key])
    assert table.keys() == set(KEYS[:7])


def test_keys_may_come_in_pieces(tmp_path: Path) -> None:
    write_signals(tmp_path, SCORING, [signal_row(key, 1, seed=0) for key in KEYS[:3]])
    pieces = pa.chunked_array([as_keys([KEYS[2], KEYS[7]]), as_keys([]), as_keys([KEYS[0]])])
    assert read_signals(tmp_path, SCORING).locate(pieces).tolist() == [2, -1, 0]


def test_a_key_that_two_writers_scored_is_found_once(tmp_path: Path) -> None:
    rows = [signal_row(KEYS[0], 2, seed=seed) for seed in (0, 1)]
    for row in rows:
        write_signals(tmp_path, SCORING, [row])
    table = read_signals(tmp_path, SCORING)
    (number,) = table.locate(as_keys(KEYS[:1]))
    assert table.row(int(number)).token_logprobs.tolist() in [row.token_logprobs.tolist() for row in rows]
    assert table.keys() == {KEYS[0]}


def test_a_scoring_without_rows_has_none_of_the_keys(tmp_path: Path) -> None:
    table = read_signals(tmp_path, SCORING)
    assert table.locate(as_keys(KEYS)).tolist() == [-1] * len(KEYS)
    assert table.keys() == set()


def test_no_keys_have_no_places(tmp_path: Path) -> None:
    write_signals(tmp_path, SCORING, [signal_row(KEYS[0], 1, seed=0)])
    assert read_signals(tmp_path, SCORING).locate(as_keys([])).tolist() == []


def test_a_damaged_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    write_signals(tmp_path, SCORING, [signal_row(KEYS[0], 1, seed=0)])
    (path,) = list_shards(SCORING.folder(tmp_path), "signals")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedFileError) as caught:
        read_signals(tmp_path, SCORING)
    assert str(caught.value).startswith(f"{path}: damaged: ")


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": replace(SCORING.teacher, digest="other")},
        {"reference": ModelIdentity("org/reference", None, "other")},
        {"reference": None},
        {"teacher": replace(SCORING.teacher, digest="reference-digest"), "reference": SCORING.teacher},
        {"vocabulary": "other"},
        {"top_k": K + 1},
        {"dtype": "float32"},
        {"engine": "hf"},
    ],
    ids=["teacher", "reference", "no reference", "exchanged", "vocabulary", "K", "dtype", "engine"],
)
def test_the_id_depends_on_who_judged_and_how(change: dict[str, Any]) -> None:
    assert replace(SCORING, **change).id != SCORING.id


@pytest.mark.parametrize("model", ["teacher", "reference"])
@pytest.mark.parametrize("change", [{"name": "/models/moved"}, {"revision": "v2"}])
def test_the_id_does_not_depend_on_names_and_revisions(model: str, change: dict[str, str]) -> None:
    moved = replace(SCORING, **{model: replace(getattr(SCORING, model), **change)})
    assert moved.id == SCORING.id


def test_the_id_stays_the_same_from_version_to_version() -> None:
    """A cache outlives the program that wrote it."""
    assert SCORING.id == "636afaa1f4f050dc"


def test_a_scoring_comes_back_from_the_cache(tmp_path: Path) -> None:
    without = replace(SCORING, reference=None)
    for scoring in (SCORING, without):
        write_scoring(tmp_path, scoring)
    assert sorted(read_scorings(tmp_path), key=lambda one: one.id) == sorted([SCORING, without], key=lambda one: one.id)
    assert read_scoring(tmp_path, without.id) == without


def test_a_scoring_is_read_whatever_its_neighbours_are(tmp_path: Path) -> None:
    neighbour = replace(SCORING, top_k=SCORING.top_k + 1)
    for scoring in (SCORING, neighbour):
        write_scoring(tmp_path, scoring)
    (neighbour.folder(tmp_path) / "scoring.json").write_text("{")
    assert read_scoring(tmp_path, SCORING.id) == SCORING
    with pytest.raises(FileNotFoundError):
        read_scoring(tmp_path, "0" * 16)


def test_a_cache_without_scorings_has_none(tmp_path: Path) -> None:
    assert list(read_scorings(tmp_path)) == []


def test_the_name_that_a_scoring_was_first_written_with_stays(tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    write_scoring(tmp_path, replace(SCORING, teacher=replace(SCORING.teacher, name="/models/moved")))
    assert list(read_scorings(tmp_path)) == [SCORING]


@pytest.mark.parametrize(
    "tampered",
    [
        json.dumps(asdict(replace(SCORING, top_k=K + 1))),
        json.dumps(asdict(replace(SCORING, reference=None))),
        json.dumps(asdict(SCORING) | {"temperature": 1.0}),
        json.dumps({"teacher": asdict(SCORING.teacher)}),
        json.dumps(asdict(SCORING))[:-5],
        "[]",
        "7",
        "",
        b"\xff\xfe",
    ],
    ids=["another K", "no reference", "unknown field", "missing fields", "cut off", "list", "number", "empty", "bytes"],
)
def test_a_tampered_scoring_is_refused_by_its_file(tampered: str | bytes, tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    path = SCORING.folder(tmp_path) / "scoring.json"
    path.write_bytes(tampered.encode() if isinstance(tampered, str) else tampered)
    with pytest.raises(DamagedFileError) as caught:
        list(read_scorings(tmp_path))
    assert str(caught.value).startswith(f"{path}: damaged: ")


def test_a_scoring_is_described_by_its_models_and_its_settings() -> None:
    assert SCORING.describe() == (
        f"{SCORING.id}: teacher org/teacher, reference org/reference, K = {K}, bfloat16, vllm"
    )
    assert "no reference" in replace(SCORING, reference=None).describe()


def test_a_scoring_of_version_1_has_no_checksum(tmp_path: Path) -> None:
    write_file(SCORING.folder(tmp_path) / "scoring.json", json.dumps(asdict(SCORING), indent=2).encode())
    assert list(read_scorings(tmp_path)) == [SCORING]


def test_a_description_has_a_checksum_of_names_and_revisions_too(tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    path = SCORING.folder(tmp_path) / "scoring.json"
    path.write_text(path.read_text().replace("org/teacher", "org/another"))
    with pytest.raises(DamagedFileError, match="checksum"):
        list(read_scorings(tmp_path))


def test_a_field_of_a_newer_format_is_refused_by_its_name(tmp_path: Path) -> None:
    path = SCORING.folder(tmp_path) / "scoring.json"
    write_document(path, asdict(SCORING) | {"layers": 3})
    with pytest.raises(CacheError) as caught:
        list(read_scorings(tmp_path))
    assert str(caught.value) == f"{path}: of a newer format: it has the unknown field 'layers'; install a newer adpa"


@pytest.mark.parametrize("top_k", [0, -1, 1 << 40])
def test_a_scoring_of_absurd_size_is_refused_before_a_row_is_read(top_k: int, tmp_path: Path) -> None:
    write_scoring(tmp_path, replace(SCORING, top_k=top_k))
    with pytest.raises(DamagedFileError, match=f"its top_k is {top_k}; expected 1 to 16777216"):
        list(read_scorings(tmp_path))


def test_a_folder_without_a_description_is_no_scoring(tmp_path: Path) -> None:
    (tmp_path / "scorings" / "0123456789abcdef").mkdir(parents=True)
    (tmp_path / "scorings" / "notes.txt").touch()
    assert list(read_scorings(tmp_path)) == []


def test_a_loop_of_links_among_the_scorings_is_told(tmp_path: Path) -> None:
    (tmp_path / "scorings").mkdir()
    (tmp_path / "scorings" / SCORING.id).symlink_to(SCORING.id)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        list(read_scorings(tmp_path))


def other_columns() -> dict[str, pa.Table]:
    """Tables whose columns are not those of ``SCORING``'s signals."""
    row = signal_row(KEYS[0], 2, seed=0)
    table = compact_table([row], K, lossy=False)
    unknown = {b"adpa": json.dumps({"encoding": "exact", "top_k": 2**40}).encode()}
    return {
        "no key": table.drop_columns(["key"]),
        "a key of text": table.set_column(0, "key", pa.array(["key"])),
        "ids that are no bytes": table.set_column(5, "topk_ids", pa.array([7])),
        "another K": compact_table([signal_row(KEYS[0], 2, seed=0, top_k=K + 1)], K + 1, lossy=False),
        "an absurd K": table.replace_schema_metadata(unknown),
        "no metadata": table.replace_schema_metadata(None),
        "deep metadata": table.replace_schema_metadata({b"adpa": b"[" * 100_000}),
        "the lossy form": compact_table([row], K, lossy=True),
        "plain of another K": plain_table([signal_row(KEYS[0], 2, seed=0, top_k=1)], plain_schema(1)),
        "samples": pa.table({"key": pa.array([KEYS[0]], pa.binary(16))}),
    }


@pytest.mark.parametrize("name", other_columns())
def test_a_shard_with_other_columns_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    path = write_shard(SCORING.folder(tmp_path), "signals", other_columns()[name])
    with pytest.raises(DamagedFileError) as caught:
        read_signals(tmp_path, SCORING)
    assert str(caught.value).startswith(f"{path}: damaged: ")


@pytest.mark.parametrize("change", [{"lossy": True}, {"top_p": 0.9}])
def test_plain_signals_are_exact_and_whole(change: dict[str, Any], tmp_path: Path) -> None:
    scoring = replace(SCORING, **change)
    write_shard(scoring.folder(tmp_path), "signals", plain_table([signal_row(KEYS[0], 2, seed=0)], plain_schema(K)))
    with pytest.raises(DamagedFileError, match="not those of its scoring's signals"):
        read_signals(tmp_path, scoring)


def test_an_encoding_that_nobody_knows_yet_is_a_newer_format(tmp_path: Path) -> None:
    table = compact_table([signal_row(KEYS[0], 2, seed=0)], K, lossy=False)
    newer = table.replace_schema_metadata({"adpa": json.dumps({"encoding": "wavelet", "top_k": K})})
    path = write_shard(SCORING.folder(tmp_path), "signals", newer)
    with pytest.raises(CacheError, match="of a newer format: its encoding is 'wavelet'") as caught:
        read_signals(tmp_path, SCORING)
    assert str(path) in str(caught.value)
    assert not isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 3.5},
        {"top_p": "x"},
        {"top_p": 1.5},
        {"lossy": "no"},
        {"dtype": 7},
        {"vocabulary": [1]},
        {"engine": None},
    ],
    ids=str,
)
def test_a_description_with_a_value_of_another_kind_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """Its id is that of its folder and its checksum is right, but adpa never writes it."""
    write_scoring(tmp_path, replace(SCORING, **change))
    with pytest.raises(DamagedFileError, match=r"scoring\.json: damaged: "):
        list(read_scorings(tmp_path))


def test_an_encoding_that_is_no_name_is_damage(tmp_path: Path) -> None:
    table = compact_table([signal_row(KEYS[0], 2, seed=0)], K, lossy=False)
    how = {"adpa": json.dumps({"encoding": [1], "top_k": K})}
    write_shard(SCORING.folder(tmp_path), "signals", table.replace_schema_metadata(how))
    with pytest.raises(DamagedFileError, match="does not say how it is encoded"):
        read_signals(tmp_path, SCORING)


@pytest.mark.parametrize(("top_p", "lossy"), [(1.0, False), (0.5, False), (1.0, True), (0.5, True)])
def test_the_sums_of_advantages_are_those_of_the_rows(top_p: float, lossy: bool, tmp_path: Path) -> None:
    scoring = replace(SCORING, top_k=8, top_p=top_p, lossy=lossy)
    rows = [teacher_row(bytes([number]) * 16, number % 7, number, top_k=8, vocabulary=64) for number in range(60)]
    for shard in (rows[:1], rows[1:40], rows[40:]):
        write_signals(tmp_path, scoring, [keep_nucleus(row, top_p) for row in shard])
    numbers = np.array([59, 3, 0, 17, 3, 40])
    for signals in (read_signals(tmp_path, scoring), peek_signals(tmp_path, scoring)):
        for some in (np.arange(60), numbers, numbers[:0]):
            stored = [signals.row(int(number)).token_advantages for number in some]
            expected = [0.0 if row is None else row.sum(dtype=np.float64) for row in stored]
            np.testing.assert_allclose(signals.advantage_sums(some), expected, rtol=1e-12, atol=1e-12)


def test_sums_of_more_rows_than_are_decoded_at_once(tmp_path: Path) -> None:
    rows = [signal_row(number.to_bytes(16), 3, number) for number in range(600)]
    expected = [row.token_advantages.sum(dtype=np.float64) for row in rows if row.token_advantages is not None]
    write_signals(tmp_path, SCORING, rows)
    plain = plain_table(rows, plain_schema(K))
    for signals in (read_signals(tmp_path, SCORING), SignalTable([plain.slice(0, 300), plain.slice(300)])):
        numbers = signals.locate(as_keys([row.key for row in rows]))
        np.testing.assert_allclose(signals.advantage_sums(numbers), expected, rtol=1e-12)


@pytest.mark.parametrize("compact", [True, False])
def test_sums_without_a_reference_are_refused(compact: bool) -> None:
    rows = [signal_row(bytes([number]) * 16, 3, number, reference=False) for number in range(3)]
    table = compact_table(rows, K, lossy=False) if compact else plain_table(rows, plain_schema(K))
    with pytest.raises(DamagedFileError, match=f"{'00' * 16} or of one soon after it .* 3 of 3 rows lack advantages"):
        SignalTable([table]).advantage_sums(np.arange(3))


@pytest.mark.parametrize("tokens", [2, 4, -1, 1 << 30])
def test_sums_of_advantages_that_do_not_decode_are_refused(tokens: int) -> None:
    table = compact_table([signal_row(b"k" * 16, 3, 0)], K, lossy=False)
    place = table.schema.get_field_index("tokens")
    table = table.set_column(place, table.schema.field("tokens"), pa.array([tokens], pa.int32()))
    with pytest.raises(DamagedFileError, match="cannot be decoded"):
        SignalTable([table]).advantage_sums(np.arange(1))

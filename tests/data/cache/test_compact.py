"""The compact encoding: the same numbers bit for bit, in fewer bytes; rows that do not decode are refused."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.data.makers import K, assert_same_row, signal_row, teacher_row

from adpa.data.cache.compact import CODEC, ERRORS, compact_schema, compact_table, is_compact, read_compact_row
from adpa.data.cache.shards import serialize
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.errors import DamagedFileError

KEYS = [bytes([number]) * 16 for number in range(8)]


def in_float16(row: SignalRow) -> SignalRow:
    """The row as the exact encoding keeps it."""
    advantages = row.topk_advantages
    return replace(
        row,
        topk_logprobs=row.topk_logprobs.astype(np.float16),
        topk_advantages=None if advantages is None else advantages.astype(np.float16),
    )


@pytest.mark.parametrize("reference", [True, False], ids=["with a reference", "without a reference"])
def test_rows_come_back_bit_for_bit(reference: bool) -> None:
    rows = [signal_row(key, length, seed=length, reference=reference) for length, key in enumerate(KEYS)]
    table = compact_table(rows, K, lossy=False)
    assert is_compact(table.schema)
    assert not is_compact(plain_schema(K))
    for place, row in enumerate(rows):
        assert_same_row(read_compact_row(table, place), row)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 9), top_k=st.integers(1, 7))
def test_any_bits_come_back(data: st.DataObject, tokens: int, top_k: int) -> None:
    """Every float16 and float32, NaN and both zeros among them, sorted or not."""

    def bits(kind: Any, shape: tuple[int, ...]) -> Any:
        return data.draw(hnp.arrays(kind, shape))

    counts = data.draw(hnp.arrays(np.int64, tokens, elements=st.integers(1, top_k)))
    kept = np.arange(top_k) < counts[:, None]
    ids = np.where(kept, bits(np.int32, (tokens, top_k)) & 0x7FFFFFFF, -1)
    logprobs, advantages = (bits(np.uint16, (tokens, top_k)).view(np.float16) for _ in range(2))
    row = SignalRow(
        key=KEYS[0],
        token_logprobs=bits(np.uint32, (tokens,)).view(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=np.where(kept, logprobs, np.float16(-np.inf)),
        tail_logprob=bits(np.uint32, (tokens,)).view(np.float32),
        token_advantages=bits(np.uint32, (tokens,)).view(np.float32),
        topk_advantages=np.where(kept, advantages, np.float16(0)),
    )
    assert_same_row(read_compact_row(compact_table([row], top_k, lossy=False), 0), row)


@pytest.mark.parametrize("lossy", [False, True])
def test_ragged_rows_come_back_padded(lossy: bool) -> None:
    row = in_float16(keep_nucleus(teacher_row(KEYS[0], 30, seed=0, vocabulary=2000), 0.9))
    counts = (row.topk_ids != -1).sum(1)
    assert len(set(counts.tolist())) > 5
    read = read_compact_row(compact_table([row], 50, lossy), 0)
    np.testing.assert_array_equal(read.topk_ids, row.topk_ids)
    padding = row.topk_ids == -1
    assert np.isneginf(read.topk_logprobs[padding]).all()
    assert read.topk_advantages is not None
    assert (read.topk_advantages[padding] == 0).all()
    if not lossy:
        assert_same_row(read, row)


def test_ragged_rows_take_fewer_bytes() -> None:
    rows = [in_float16(teacher_row(KEYS[0], 100, seed=0, vocabulary=2000))]
    whole, cut = (
        serialize(compact_table([keep_nucleus(row, top_p) for row in rows], 50, lossy=False)).size
        for top_p in (1.0, 0.8)
    )
    kept = (keep_nucleus(rows[0], 0.8).topk_ids != -1).mean()
    assert cut < whole * (kept + 0.1)


@pytest.mark.parametrize(("vocabulary", "share"), [(49152, 0.63), (128_256, 0.66)])
def test_a_teachers_rows_take_two_thirds_of_their_plain_bytes(vocabulary: int, share: float) -> None:
    rows = [teacher_row(key, 64, seed, vocabulary=vocabulary) for seed, key in enumerate(KEYS[:3])]
    compact = serialize(compact_table(rows, 50, lossy=False)).size
    assert compact < share * serialize(plain_table(rows, plain_schema(50))).size


def test_rows_are_independent() -> None:
    """Tables may be cut and joined: a row does not depend on its neighbours."""
    rows = [signal_row(key, 3 + length, seed=length) for length, key in enumerate(KEYS)]
    table = compact_table(rows, K, lossy=False)
    joined = pa.concat_tables([table.slice(5), table.take([2, 0])]).combine_chunks()
    for place, number in enumerate([5, 6, 7, 2, 0]):
        assert_same_row(read_compact_row(joined, place), rows[number])


def changed(table: pa.Table, name: str, value: Any) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array([value], field.type))


def with_metadata(table: pa.Table, **metadata: Any) -> pa.Table:
    return table.replace_schema_metadata({"adpa": json.dumps(metadata)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: changed(table, "tokens", 5),
        lambda table: changed(table, "tokens", -1),
        lambda table: changed(table, "tokens", 2**31 - 1),
        lambda table: changed(table, "topk_ids", b"no zstd"),
        lambda table: changed(table, "topk_ids", b""),
        lambda table: changed(table, "topk_ids", CODEC.compress(bytes(10**6), asbytes=True)),
        lambda table: changed(table, "topk_counts", CODEC.compress(b"\xff" * 16, asbytes=True)),
        lambda table: with_metadata(table, encoding="exact", top_k=2**40),
        lambda table: with_metadata(table, encoding="exact", top_k=-3),
        lambda table: with_metadata(table, encoding="exact", top_k="3"),
        lambda table: with_metadata(table, encoding="exact", top_k=K + 1),
        lambda table: with_metadata(table, encoding="rounded", top_k=K),
        lambda table: table.replace_schema_metadata(None),
        lambda table: table.replace_schema_metadata({"adpa": "["}),
    ],
    ids=[
        "too many tokens",
        "fewer than none",
        "absurdly many tokens",
        "no zstd",
        "empty",
        "more than there are",
        "absurd counts",
        "absurd K",
        "negative K",
        "K as text",
        "another K",
        "another encoding",
        "no metadata",
        "no JSON",
    ],
)
def test_what_does_not_decode_is_refused_by_its_key(damage: Any) -> None:
    table = compact_table([signal_row(KEYS[1], 4, seed=0)], K, lossy=False)
    with pytest.raises(DamagedFileError, match=f"^the signal row {KEYS[1].hex()} cannot be decoded"):
        read_compact_row(damage(table), 0)


def test_an_encoding_that_is_not_known_is_a_newer_format() -> None:
    table = with_metadata(compact_table([signal_row(KEYS[1], 4, seed=0)], K, lossy=False), encoding="wavelet", top_k=K)
    with pytest.raises(DamagedFileError, match="wavelet"):
        read_compact_row(table, 0)


def test_lossy_rows_note_their_own_error() -> None:
    rows = [teacher_row(key, 40, seed, vocabulary=5000) for seed, key in enumerate(KEYS)]
    table = compact_table(rows, 50, lossy=True)
    assert set(table.column_names) - set(compact_schema(50, lossy=False).names) == {
        "kl_error",
        "largest_kl_error",
        "advantage_error",
    }
    assert all(0 < error <= 1e-3 for error in table["kl_error"].to_pylist())
    assert all(0 < error <= 1e-2 for error in table["largest_kl_error"].to_pylist())
    assert all(0 < error <= 0.05 for error in table["advantage_error"].to_pylist())


@pytest.mark.parametrize("lossy", [False, True])
def test_a_row_without_tokens_comes_back_without_an_error(lossy: bool) -> None:
    row = signal_row(KEYS[0], 0, seed=0)
    table = compact_table([row], K, lossy)
    read = read_compact_row(table, 0)
    assert (read.topk_ids.shape, read.token_logprobs.shape) == ((0, K), (0,))
    assert not lossy or [table[field.name][0].as_py() for field in ERRORS] == [0, 0, 0]


@pytest.mark.parametrize("advantage", [np.inf, -np.inf, np.nan])
def test_an_advantage_that_is_no_number_is_not_rounded(advantage: float) -> None:
    row = teacher_row(KEYS[0], 2, seed=0, top_k=K)
    assert row.topk_advantages is not None
    row.topk_advantages[1, 0] = advantage
    with pytest.raises(AssertionError, match="not a finite number"):
        compact_table([row], K, lossy=True)

"""Signal rows, the nucleus of their ids, and plain tables of them."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.data.makers import K, assert_same_row, signal_row, teacher_row

from adpa.data.cache.shards import read_shard, write_shard
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_bytes, plain_schema, plain_table, read_plain_row

KEYS = [bytes([number]) * 16 for number in range(8)]
ARRAYS = [field.name for field in fields(SignalRow) if field.name != "key"]


def row_of(probabilities: list[list[float]], tails: list[float]) -> SignalRow:
    """One response whose ids are 10, 11, 12, … at every token; advantages are their ranks."""
    logprobs = np.log(np.array(probabilities)).astype(np.float32)
    tokens, top_k = logprobs.shape
    return SignalRow(
        key=KEYS[0],
        token_logprobs=logprobs[:, 0],
        topk_ids=np.tile(np.arange(10, 10 + top_k, dtype=np.int32), (tokens, 1)),
        topk_logprobs=logprobs,
        tail_logprob=np.log(tails).astype(np.float32),
        token_advantages=np.ones(tokens, np.float32),
        topk_advantages=np.tile(np.arange(top_k, dtype=np.float32), (tokens, 1)),
    )


def test_a_nucleus_is_the_fewest_ids_that_have_the_mass() -> None:
    row = row_of([[0.5, 0.25, 0.125], [0.95, 0.02, 0.01], [0.3, 0.2, 0.1]], [0.125, 0.02, 0.4])
    cut = keep_nucleus(row, 0.7)
    assert cut.topk_ids.tolist() == [[10, 11, -1], [10, -1, -1], [10, 11, 12]]
    assert np.isneginf(cut.topk_logprobs).tolist() == [[False, False, True], [False, True, True], [False] * 3]
    assert cut.topk_advantages is not None
    assert cut.topk_advantages.tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 2]]
    np.testing.assert_allclose(np.exp(cut.tail_logprob), [0.25, 0.05, 0.4], rtol=1e-6)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_a_nucleus_loses_no_probability_and_always_has_an_id(top_p: float) -> None:
    row = teacher_row(KEYS[0], 20, seed=0, vocabulary=500)
    cut = keep_nucleus(row, top_p)
    mass = np.exp(cut.topk_logprobs.astype(np.float64)).sum(1)
    np.testing.assert_allclose(mass + np.exp(cut.tail_logprob.astype(np.float64)), 1, atol=1e-6)
    counts = (cut.topk_ids != -1).sum(1)
    assert (counts >= 1).all()
    reached = mass >= top_p * (1 - 1e-6)
    assert (reached | (counts == 50)).all(), "neither the mass nor all of K"
    smallest = np.exp(cut.topk_logprobs[np.arange(20), counts - 1])
    assert (mass - smallest < top_p + 1e-6).all(), "one id less would do"


def test_all_the_mass_is_all_ids() -> None:
    row = teacher_row(KEYS[0], 3, seed=0, vocabulary=500)
    assert keep_nucleus(row, 1.0) is row


def test_a_nucleus_of_a_certain_token_has_an_empty_tail_and_one_id() -> None:
    row = row_of([[1.0, 1e-30]], [1e-30])
    cut = keep_nucleus(row, 0.99)
    assert cut.topk_ids.tolist() == [[10, -1]]
    assert np.exp(cut.tail_logprob[0]) < 1e-29


@pytest.mark.parametrize("top_k", [1, 50])
def test_a_plain_table_has_the_columns_of_version_1(top_k: int) -> None:
    per_id = f"list<item: fixed_size_list<item: halffloat>[{top_k}]>"
    assert {field.name: str(field.type) for field in plain_schema(top_k)} == {
        "key": "fixed_size_binary[16]",
        "token_logprobs": "list<item: float>",
        "token_advantages": "list<item: float>",
        "topk_ids": f"list<item: fixed_size_list<item: int32>[{top_k}]>",
        "topk_logprobs": per_id,
        "topk_advantages": per_id,
        "tail_logprob": "list<item: float>",
    }


@pytest.mark.parametrize("reference", [True, False], ids=["with a reference", "without a reference"])
def test_plain_rows_come_back_bit_for_bit(reference: bool, tmp_path: Path) -> None:
    rows = [signal_row(key, length, seed=length, reference=reference) for length, key in enumerate(KEYS)]
    table = read_shard(write_shard(tmp_path, "signals", plain_table(rows, plain_schema(K))))
    for place, row in enumerate(rows):
        assert_same_row(read_plain_row(table, place), row)


def test_plain_log_probabilities_are_kept_in_float16_unless_told_otherwise() -> None:
    row = replace(signal_row(KEYS[0], 1, 0), topk_logprobs=np.array([[-1 / 3, -2 / 3, -3]], np.float32))
    half, single = (
        read_plain_row(plain_table([row], schema), 0) for schema in (plain_schema(K), plain_schema(K, pa.float32()))
    )
    assert half.topk_logprobs.tolist() == row.topk_logprobs.astype(np.float16).tolist()
    assert single.topk_logprobs.tolist() == row.topk_logprobs.tolist()


def test_without_a_reference_the_advantages_are_null() -> None:
    table = plain_table([signal_row(key, 2, seed=0, reference=False) for key in KEYS], plain_schema(K))
    assert {name: table[name].null_count for name in table.column_names if table[name].null_count} == dict.fromkeys(
        ["token_advantages", "topk_advantages"], len(KEYS)
    )


def test_plain_rows_are_read_only_views() -> None:
    row = read_plain_row(plain_table([signal_row(KEYS[0], 4, seed=0)], plain_schema(K)), 0)
    assert not any(getattr(row, name).flags.writeable for name in ARRAYS)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("top_k", [1, 8, 50])
def test_the_size_of_a_plain_table_is_foretold_to_a_few_per_cent(reference: bool, top_k: int, tmp_path: Path) -> None:
    tokens = 20_000
    rows = [signal_row(KEYS[0], tokens, seed=0, top_k=top_k, reference=reference)]
    path = write_shard(tmp_path, "signals", plain_table(rows, plain_schema(top_k)))
    assert path.stat().st_size == pytest.approx(tokens * plain_bytes(top_k, reference), rel=0.03)

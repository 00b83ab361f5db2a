"""Joins responses with their signals as plain columns, for programs that know nothing of adpa.

Log-probabilities and advantages are float32: every program reads it, and it holds the stored numbers exactly. Positions
with fewer than K ids have shorter lists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.cache.ragged import list_column
from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import PADDING, SignalRow

IDS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_ids", IDS),
        ("response_ids", IDS),
        ("token_logprobs", NUMBERS),
        ("token_advantages", NUMBERS),
        ("topk_ids", pa.list_(IDS)),
        ("topk_logprobs", pa.list_(NUMBERS)),
        ("topk_advantages", pa.list_(NUMBERS)),
        ("tail_logprob", NUMBERS),
    ]
)
TOKENS_AT_ONCE = 1 << 15


def joined_tables(scored: ScoredSet) -> Iterator[pa.Table]:
    """A scored set, in its order, as tables of ``SCHEMA`` with about ``TOKENS_AT_ONCE`` response tokens each.

    Without a reference, advantages are null.
    """
    numbers = scored.signals.locate(scored.responses.table["key"])
    start, tokens, rows = 0, 0, []
    for end, number in enumerate(numbers, start=1):
        rows.append(scored.signals.row(int(number)))
        tokens += len(rows[-1].token_logprobs)
        if tokens >= TOKENS_AT_ONCE or end == len(numbers):
            yield _table(scored.responses.table.slice(start, end - start), rows)
            start, tokens, rows = end, 0, []


def _table(responses: pa.Table, rows: Sequence[SignalRow]) -> pa.Table:
    written_TK = [row.topk_ids != PADDING for row in rows]
    columns = [responses[name].combine_chunks() for name in ("example_id", "prompt_ids", "response_ids")]
    for field in list(SCHEMA)[3:]:
        values = [getattr(row, field.name) for row in rows]
        if any(value is None for value in values):
            columns.append(pa.nulls(len(rows), field.type))
        elif field.type == NUMBERS:
            columns.append(list_column(values, NUMBERS))
        else:
            columns.append(_nested_column(values, written_TK, field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _nested_column(
    values: Sequence[NDArray[Any]], written_TK: Sequence[NDArray[np.bool_]], type: pa.ListType
) -> pa.ListArray:
    """A column of lists of lists: of each array [T, K], the entries that ``written_TK`` marks."""
    flat = [value[written] for value, written in zip(values, written_TK, strict=True)]
    lengths = np.concatenate([written.sum(axis=1) for written in written_TK])
    element = type.value_type.value_type
    inner = pa.ListArray.from_arrays(_offsets(lengths), np.concatenate(flat).astype(element.to_pandas_dtype()))
    return pa.ListArray.from_arrays(_offsets([len(value) for value in values]), inner).cast(type)


def _offsets(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

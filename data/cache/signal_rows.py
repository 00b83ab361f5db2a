"""Signal rows: the numbers of a scoring for one token sequence; and tables with a plain column for each array.

Plain tables are format version 1, and hold pending rows (the teacher's, before the reference). ``compact.py`` has
version 2.

Shapes: T response tokens, K ids of the teacher's top K.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.cache.ragged import list_column, list_row
from adpa.errors import DamagedFileError

PADDING = -1


@dataclass(frozen=True)
class SignalRow:
    """The numbers of a scoring for one token sequence; log-probabilities are natural logarithms.

    If a token has fewer than K ids, padding follows them: id −1, log-probability −inf, advantage 0.

    Attributes:
        key: the sequence's key, 16 bytes.
        token_logprobs: float32 [T], the teacher's log-probability of the response's own tokens.
        topk_ids: int32 [T, K], by falling teacher probability.
        topk_logprobs: [T, K], the teacher's log-probabilities of them.
        tail_logprob: float32 [T], the log of the probability of all other ids.
        token_advantages: float32 [T], teacher minus reference for the response's own tokens.
        topk_advantages: [T, K], teacher minus reference at ``topk_ids``.
    """

    key: bytes
    token_logprobs: NDArray[np.float32]
    topk_ids: NDArray[np.int32]
    topk_logprobs: NDArray[Any]
    tail_logprob: NDArray[np.float32]
    token_advantages: NDArray[np.float32] | None = None
    topk_advantages: NDArray[Any] | None = None


def check_length(row: SignalRow, tokens: int) -> None:
    """Checks that a row belongs to a response with this number of tokens.

    Raises:
        DamagedFileError: it is not.
    """
    arrays: list[NDArray[Any] | None] = [row.token_logprobs, row.topk_ids, row.topk_logprobs, row.tail_logprob]
    arrays += [row.token_advantages, row.topk_advantages]
    lengths = sorted({len(array) for array in arrays if array is not None})
    if lengths != [tokens]:
        raise DamagedFileError(
            f"the signal row {row.key.hex()} is of {' and '.join(map(str, lengths))} tokens; its response has {tokens}",
            "run adpa cache verify --repair",
        )


def keep_nucleus(row: SignalRow, top_p: float) -> SignalRow:
    """Keeps of each token the fewest ids whose probabilities sum to at least ``top_p``; the rest joins the tail.

    A token whose K ids sum to less keeps all of them.
    """
    if top_p == 1:
        return row
    logprobs_TK = row.topk_logprobs.astype(np.float64)
    before_TK = np.cumsum(np.exp(logprobs_TK), axis=1) - np.exp(logprobs_TK)
    kept_TK = (before_TK < top_p) & (row.topk_ids != PADDING)
    dropped_T = np.where(kept_TK, 0.0, np.exp(logprobs_TK)).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.logaddexp(row.tail_logprob.astype(np.float64), np.log(dropped_T))
    return replace(
        row,
        topk_ids=np.where(kept_TK, row.topk_ids, np.int32(PADDING)),
        topk_logprobs=np.where(kept_TK, row.topk_logprobs, -np.inf),
        topk_advantages=None if row.topk_advantages is None else np.where(kept_TK, row.topk_advantages, 0),
        tail_logprob=tail_T.astype(np.float32),
    )


def plain_schema(top_k: int, logprob_type: pa.DataType | None = None) -> pa.Schema:
    """The schema of a plain table; default of ``logprob_type``: float16."""
    per_token = pa.list_(pa.float32())
    per_id = pa.list_(pa.list_(logprob_type or pa.float16(), top_k))
    return pa.schema(
        [
            pa.field("key", pa.binary(16), nullable=False),
            pa.field("token_logprobs", per_token),
            pa.field("token_advantages", per_token),
            pa.field("topk_ids", pa.list_(pa.list_(pa.int32(), top_k))),
            pa.field("topk_logprobs", per_id),
            pa.field("topk_advantages", per_id),
            pa.field("tail_logprob", per_token),
        ]
    )


def plain_bytes(top_k: int, with_reference: bool) -> int:
    """Bytes that a plain table takes for one response token."""
    per_token, per_id = 2 * 4, 4 + 2
    return per_token + per_id * top_k + (4 + 2 * top_k if with_reference else 0)


def plain_table(rows: Sequence[SignalRow], schema: pa.Schema) -> pa.Table:
    """Signal rows as a plain table; a column that no row has is null."""
    columns = []
    for field in schema:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "key":
            columns.append(pa.array(values, field.type))
        elif any(value is None for value in values):
            assert all(value is None for value in values), "rows with and without a reference in one table"
            columns.append(pa.nulls(len(values), field.type))
        else:
            columns.append(list_column(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def read_plain_row(table: pa.Table, place: int) -> SignalRow:
    """One row of a plain table; its arrays are read-only views of the table's memory."""
    arrays: dict[str, Any] = {
        name: list_row(column, place) if column[place].is_valid else None
        for name, column in zip(table.column_names, table.columns, strict=True)
        if name != "key"
    }
    return SignalRow(table["key"][place].as_py(), **arrays)


def plain_advantage_sums(table: pa.Table) -> NDArray[np.float64]:
    """Σ_t of the token advantages of each row of a plain table [rows]; reads no other column.

    Raises:
        ValueError: a row has none.
    """
    column = table["token_advantages"].combine_chunks()
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} rows lack advantages")
    tokens_R = column.value_lengths().to_numpy()
    row_N = np.repeat(np.arange(len(column)), tokens_R)
    return np.bincount(row_N, column.flatten().to_numpy(), len(column)).astype(np.float64)

"""The compact encoding of signal rows, format version 2: the same values in about half the bytes.

Each row is encoded by itself, so that reading one row touches no other. Each of its arrays becomes one binary value:
the bytes of the array are sorted by significance (all lowest bytes, then all second bytes, and so on), and each of
these planes is a zstd frame. Arrays [T, K] are stored by rank: first the most probable id of every token.
Log-probabilities fall along the ranks; each is stored as the difference between its bits and those of the rank before.
``docs/format.md`` specifies the encoding.

Shapes: T response tokens, K ids, E entries that are not padding.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adpa.data.cache.locations import Location
from adpa.data.cache.rounding import (
    LOGPROBS,
    advantage_errors,
    kl_errors,
    restore_advantages,
    round_advantages,
    round_logprobs,
)
from adpa.data.cache.shards import damaged
from adpa.data.cache.signal_rows import PADDING, SignalRow
from adpa.errors import CacheError, DamagedFileError

CODEC = pa.Codec("zstd", compression_level=1)
ENCODINGS = {"exact": False, "rounded": True}
LARGEST_ARRAY = 1 << 28  # in bytes: a million tokens with 64 ids each

ARRAYS = [
    pa.field("token_logprobs", pa.binary(), nullable=False),
    pa.field("token_advantages", pa.binary()),
    pa.field("topk_counts", pa.binary()),
    pa.field("topk_ids", pa.binary(), nullable=False),
    pa.field("topk_logprobs", pa.binary(), nullable=False),
    pa.field("topk_advantages", pa.binary()),
    pa.field("tail_logprob", pa.binary(), nullable=False),
]
ERRORS = [pa.field("kl_error", pa.float32()), pa.field("largest_kl_error", pa.float32())]
ERRORS += [pa.field("advantage_error", pa.float32())]

F16, F32, U16, U32, I32 = (np.dtype(name) for name in ("<f2", "<f4", "<u2", "<u4", "<i4"))


def compact_schema(top_k: int, lossy: bool) -> pa.Schema:
    """The schema of a compact table; its metadata says how the arrays are encoded."""
    fields = [pa.field("key", pa.binary(16), nullable=False), pa.field("tokens", pa.int32(), nullable=False), *ARRAYS]
    how = {"encoding": "rounded" if lossy else "exact", "top_k": top_k}
    return pa.schema(fields + (ERRORS if lossy else []), metadata={"adpa": json.dumps(how)})


def compact_table(rows: Sequence[SignalRow], top_k: int, lossy: bool, measured: bool = True) -> pa.Table:
    """Encodes signal rows.

    Args:
        rows: the rows; top-K log-probabilities and advantages become float16 unless ``lossy``.
        top_k: K.
        lossy: round as ``rounding.py`` says, and store the errors of each row beside it.
        measured: measure these errors; if false, write 0 for them: enough if only the size of the table matters.
    """
    schema = compact_schema(top_k, lossy)
    encoded = [_encode(row, top_k, lossy) for row in rows]
    if lossy:
        for row, columns in zip(rows, encoded, strict=True):
            columns |= _measure(row, columns, top_k) if measured else {field.name: 0.0 for field in ERRORS}
    return pa.Table.from_arrays(
        [pa.array([row.get(field.name) for row in encoded], field.type) for field in schema], schema=schema
    )


@dataclass(frozen=True)
class RoundingErrors:
    """The errors of the lossy form, in nats per token; see ``kl_errors`` and ``advantage_errors`` of ``rounding.py``.

    Attributes:
        kl: |ΔKL|, mean over the tokens.
        largest_kl: the largest of a token.
        advantage: Σ_k p_k·|ΔA_k|, mean over the tokens.
    """

    kl: float
    largest_kl: float
    advantage: float


def rounding_errors(tables: Sequence[pa.Table]) -> RoundingErrors | None:
    """The errors that lossy tables have beside their rows; none if the tables have no tokens."""
    columns = ("tokens", "kl_error", "largest_kl_error", "advantage_error")
    rows = pa.concat_tables([table.select(columns) for table in tables]) if tables else None
    if rows is None or not pc.sum(rows["tokens"]).as_py():
        return None
    tokens, kl, largest, advantage = (rows[name].to_numpy() for name in columns)
    return RoundingErrors(
        float(np.average(kl, weights=tokens)), float(largest.max()), float(np.average(advantage, weights=tokens))
    )


def check_encoding(path: Location, schema: pa.Schema) -> None:
    """Checks that this program knows the encoding of a compact table.

    Raises:
        CacheError: it does not.
    """
    try:
        encoding = json.loads(schema.metadata[b"adpa"])["encoding"]
        known = encoding in ENCODINGS
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, "its metadata does not say how it is encoded") from error
    if not known:
        raise CacheError(f"{path}: of a newer format: its encoding is {encoding!r}", "install a newer adpa")


def is_compact(schema: pa.Schema) -> bool:
    """Whether a table of signals is compact, not plain."""
    return "tokens" in schema.names


def read_compact_row(table: pa.Table, place: int) -> SignalRow:
    """Decodes one row of a compact table.

    Raises:
        DamagedFileError: the row is not what ``compact_table`` makes.
    """
    key = table["key"][place].as_py()
    try:
        how = json.loads(table.schema.metadata[b"adpa"])
        arrays = {field.name: table[field.name][place].as_buffer() for field in ARRAYS}
        return _decode(key, table["tokens"][place].as_py(), arrays, how["top_k"], ENCODINGS[how["encoding"]])
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise DamagedFileError(
            f"the signal row {key.hex()} cannot be decoded: {error}", "run adpa cache verify --repair"
        ) from error


def compact_advantage_sums(table: pa.Table) -> NDArray[np.float64]:
    """Σ_t of the token advantages of each row of a compact table [rows]; decodes no other array.

    Raises:
        ValueError, OSError: they are not what ``compact_table`` makes of rows with a reference.
    """
    encoding = json.loads(table.schema.metadata[b"adpa"])["encoding"]
    dtype = F16 if ENCODINGS[encoding] else F32
    tokens_R = table["tokens"].to_numpy().astype(np.int64)
    packed = table["token_advantages"].combine_chunks()
    if packed.null_count:
        raise ValueError(f"{packed.null_count} of {len(packed)} rows lack advantages")
    if (tokens_R < 0).any() or tokens_R.sum() * dtype.itemsize > LARGEST_ARRAY:
        raise ValueError(f"{len(tokens_R)} rows with {tokens_R.sum()} tokens")
    row_N = np.repeat(np.arange(len(tokens_R)), tokens_R)
    offsets = np.frombuffer(packed.buffers()[1], np.int32)[packed.offset :][: len(packed) + 1]
    frames = packed.buffers()[2][int(offsets[0]) : int(offsets[-1])]  # the planes of one row after another
    planes = np.frombuffer(CODEC.decompress(frames, len(row_N) * dtype.itemsize), np.uint8)
    starts_R = (np.cumsum(tokens_R) - tokens_R) * (dtype.itemsize - 1)
    lowest_N, step_N = starts_R[row_N] + np.arange(len(row_N)), tokens_R[row_N]
    values = np.stack([planes[lowest_N + byte * step_N] for byte in range(dtype.itemsize)], axis=1)
    return np.bincount(row_N, values.reshape(-1).view(dtype), len(tokens_R)).astype(np.float64)


def _encode(row: SignalRow, top_k: int, lossy: bool) -> dict[str, Any]:
    assert row.topk_ids.shape[1] == top_k, f"{row.topk_ids.shape[1]} ids where {top_k} are expected"
    kept_TK = row.topk_ids != PADDING
    counts_T = kept_TK.sum(axis=1)
    assert (kept_TK == (np.arange(top_k) < counts_T[:, None])).all(), "padding before an id"
    per_token = F16 if lossy else F32
    codes_TK = round_logprobs(row.topk_logprobs) if lossy else row.topk_logprobs.astype(F16).view(U16)
    differences_TK = codes_TK.copy()
    differences_TK[:, 1:] -= codes_TK[:, :-1]

    def by_rank(values_TK: NDArray[Any]) -> NDArray[Any]:
        return values_TK.T[kept_TK.T]

    encoded: dict[str, Any] = {
        "key": row.key,
        "tokens": len(counts_T),
        "token_logprobs": _pack(row.token_logprobs.astype(per_token)),
        "topk_counts": None if kept_TK.all() else _pack(counts_T.astype(U32)),
        "topk_ids": _pack(by_rank(row.topk_ids.astype(I32))),
        "topk_logprobs": _pack(by_rank(differences_TK)),
        "tail_logprob": _pack(row.tail_logprob.astype(per_token)),
    }
    if row.token_advantages is not None and row.topk_advantages is not None:
        advantages_TK = round_advantages(row.topk_advantages, codes_TK) if lossy else row.topk_advantages.astype(F16)
        encoded["token_advantages"] = _pack(row.token_advantages.astype(per_token))
        encoded["topk_advantages"] = _pack(by_rank(advantages_TK))
    return encoded


def _measure(row: SignalRow, encoded: dict[str, Any], top_k: int) -> dict[str, float]:
    """The rounding errors of a row; 0 if it has no tokens."""
    tokens = len(row.topk_ids)
    arrays = {field.name: encoded.get(field.name) for field in ARRAYS}
    rounded = _decode(row.key, tokens, arrays, top_k, lossy=True)
    errors_T = np.abs(kl_errors(row, rounded))
    return {
        "kl_error": errors_T.sum() / max(tokens, 1),
        "largest_kl_error": errors_T.max(initial=0),
        "advantage_error": advantage_errors(row, rounded).sum() / max(tokens, 1),
    }


def _decode(key: bytes, tokens: int, arrays: dict[str, Any], top_k: int, lossy: bool) -> SignalRow:
    if not (tokens >= 0 and top_k > 0 and tokens * top_k * I32.itemsize <= LARGEST_ARRAY):
        raise ValueError(f"{tokens} tokens with {top_k} ids each")
    kept_KT, entries = None, tokens * top_k
    if arrays["topk_counts"] is not None:
        counts_T = _unpack(arrays["topk_counts"], U32, tokens)
        if (counts_T > top_k).any():
            raise ValueError(f"{counts_T.max()} ids of a token where K is {top_k}")
        kept_KT = np.arange(top_k, dtype=U32)[:, None] < counts_T
        entries = int(kept_KT.sum())

    def by_token(name: str, dtype: np.dtype[Any], padding: float) -> NDArray[Any]:
        values_E = _unpack(arrays[name], dtype, entries)
        if kept_KT is None:
            return values_E.reshape(top_k, tokens)
        values_KT = np.full((top_k, tokens), padding, dtype)
        values_KT[kept_KT] = values_E
        return values_KT

    def per_token(name: str) -> NDArray[np.float32]:
        return _unpack(arrays[name], F16 if lossy else F32, tokens).astype(F32)

    codes_KT = np.cumsum(by_token("topk_logprobs", U16, 0), axis=0, dtype=U16)
    logprobs_KT = LOGPROBS[codes_KT] if lossy else codes_KT.view(F16)
    advantages_KT = None
    if arrays["topk_advantages"] is not None:
        if lossy:
            advantages_KT = restore_advantages(by_token("topk_advantages", U32, 0), codes_KT)
        else:
            advantages_KT = by_token("topk_advantages", F16, 0)
    if kept_KT is not None:
        logprobs_KT = np.where(kept_KT, logprobs_KT, logprobs_KT.dtype.type(-np.inf))
        if advantages_KT is not None:
            advantages_KT = np.where(kept_KT, advantages_KT, advantages_KT.dtype.type(0))
    return SignalRow(
        key=key,
        token_logprobs=per_token("token_logprobs"),
        topk_ids=by_token("topk_ids", I32, PADDING).T,
        topk_logprobs=logprobs_KT.T,
        tail_logprob=per_token("tail_logprob"),
        token_advantages=None if advantages_KT is None else per_token("token_advantages"),
        topk_advantages=None if advantages_KT is None else advantages_KT.T,
    )


def _pack(values: NDArray[Any]) -> bytes:
    """The planes of an array's bytes, least significant first, each as a zstd frame."""
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, values.itemsize).T
    return b"".join(CODEC.compress(plane.tobytes(), asbytes=True) for plane in planes)


def _unpack(packed: bytes | pa.Buffer, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    planes = np.frombuffer(CODEC.decompress(packed, count * dtype.itemsize), np.uint8)
    values = np.empty((count, dtype.itemsize), np.uint8)
    for byte, plane in enumerate(planes.reshape(dtype.itemsize, count)):
        values[:, byte] = plane  # several times as fast as a transpose
    return values.reshape(-1).view(dtype)

"""Scorings and signal rows: what the teacher, and the reference beside it, think of token sequences.

A scoring is who judged and how; ``CACHE/scorings/<id>/scoring.json`` describes it. Its signal rows lie beside it in
immutable shards, one row for each token sequence, found by the sequence's key.

Shapes: T response tokens, K ids of the teacher's top K.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adpa.data.ragged import list_column, list_row
from adpa.data.shards import read_shards, write_file, write_shard
from adpa.errors import DamagedFileError

SHARD_PREFIX = "signals"


@dataclass(frozen=True)
class ModelIdentity:
    """A checkpoint: what people call it, the Hub revision where it has one, and the digest of its weights."""

    name: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class Scoring:
    """Who judged, and how.

    The id is the digest of everything that can change a number: not of a model's name and revision, which the digest
    of its weights outranks. A checkpoint may move without losing its signals.
    """

    teacher: ModelIdentity
    reference: ModelIdentity | None
    vocabulary: str
    top_k: int
    dtype: str
    engine: str

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        identity = asdict(self) | {
            "teacher": self.teacher.digest,
            "reference": self.reference.digest if self.reference else None,
        }
        return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    def folder(self, cache: Path) -> Path:
        """Where the scoring lies in a cache."""
        return cache / "scorings" / self.id

    def describe(self) -> str:
        """One line for people who must choose among scorings."""
        reference = f", reference {self.reference.name}" if self.reference else ", no reference"
        return f"{self.id}: teacher {self.teacher.name}{reference}, K = {self.top_k}, {self.dtype}, {self.engine}"


@dataclass(frozen=True)
class SignalRow:
    """What a scoring says of one token sequence; log-probabilities are natural logarithms.

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


def signals_schema(top_k: int, logprob_type: pa.DataType | None = None) -> pa.Schema:
    """The schema of a shard; ``logprob_type`` is float16 unless told otherwise."""
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


def signal_bytes(top_k: int, with_reference: bool) -> int:
    """Bytes that a shard takes for one response token."""
    per_token, per_id = 2 * 4, 4 + 2
    return per_token + per_id * top_k + (4 + 2 * top_k if with_reference else 0)


def signals_table(rows: Sequence[SignalRow], schema: pa.Schema) -> pa.Table:
    """Signal rows as a table; a column that no row has is null."""
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


class SignalTable:
    """Signal rows of any number of shards, found by key and read from the memory map one row at a time."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = [table for table in tables if len(table)]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._keys = pa.chunked_array([chunk for table in self._tables for chunk in table["key"].chunks], pa.binary(16))

    def __len__(self) -> int:
        return len(self._keys)

    def locate(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """The row number of each key, −1 where there is none; int64 [len(keys)]."""
        found = pc.index_in(keys, value_set=self._keys)
        return pc.fill_null(found, -1).to_numpy().astype(np.int64)

    def keys(self) -> set[bytes]:
        """The keys of all rows."""
        return set(self._keys.to_pylist())

    def take(self, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """The rows of numbers that ``locate`` gave, shard by shard, each part with its places in ``numbers``."""
        assert (numbers >= 0).all(), "a sequence without its row"
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards):
            table, places = self._tables[shard], np.flatnonzero(shards == shard)
            yield places, table.take(numbers[places] - (self._ends[shard] - len(table)))

    def row(self, number: int) -> SignalRow:
        """The row of a number that ``locate`` gave; its arrays are read-only views."""
        assert 0 <= number < len(self._keys), "a sequence without its row"
        shard = int(np.searchsorted(self._ends, number, side="right"))
        table = self._tables[shard]
        place = number - (int(self._ends[shard]) - len(table))
        read: dict[str, Any] = {
            name: list_row(column, place) if column[place].is_valid else None
            for name, column in zip(table.column_names, table.columns, strict=True)
            if name != "key"
        }
        return SignalRow(table["key"][place].as_py(), **read)


def write_scoring(cache: Path, scoring: Scoring) -> None:
    """Describes a scoring in a cache; one that is already there is left as it is."""
    path = scoring.folder(cache) / "scoring.json"
    if not path.exists():
        write_file(path, json.dumps(asdict(scoring), indent=2).encode())


def read_scorings(cache: Path) -> Iterator[Scoring]:
    """Reads the description of every scoring of a cache.

    Raises:
        DamagedFileError: a description does not give the id of its folder.
    """
    for path in sorted((cache / "scorings").glob("*/scoring.json")):
        yield read_scoring_file(path)


def read_scoring_file(path: Path) -> Scoring:
    """Reads the description of a scoring.

    Raises:
        DamagedFileError: it does not give the id of its folder.
    """
    try:
        fields = json.loads(path.read_text())
        reference = fields.pop("reference")
        scoring = Scoring(
            teacher=ModelIdentity(**fields.pop("teacher")),
            reference=ModelIdentity(**reference) if reference else None,
            **fields,
        )
        found = scoring.id
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise DamagedFileError(f"{path}: damaged: {error}", "delete it and run adpa precompute again") from error
    if found != path.parent.name:
        raise DamagedFileError(f"{path}: damaged: describes {found}", "delete it and run adpa precompute again")
    return scoring


def write_signals(cache: Path, scoring: Scoring, rows: Sequence[SignalRow]) -> None:
    """Adds a shard of rows to a scoring."""
    write_shard(scoring.folder(cache), SHARD_PREFIX, signals_table(rows, signals_schema(scoring.top_k)))


def read_signals(cache: Path, scoring: Scoring) -> SignalTable:
    """Opens every row of a scoring.

    Raises:
        DamagedFileError: a shard's bytes are not those that were written.
    """
    return SignalTable(read_shards(scoring.folder(cache), SHARD_PREFIX))

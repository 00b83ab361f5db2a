"""Scorings and their signal rows: the probabilities of teacher and reference for token sequences.

A scoring is a choice of models and settings; ``CACHE/scorings/<id>/scoring.json`` describes it. Its signal rows lie
beside this file in immutable shards, one row for each token sequence, under the key of the sequence.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adpa.data.cache.compact import (
    check_encoding,
    compact_advantage_sums,
    compact_schema,
    compact_table,
    is_compact,
    read_compact_row,
)
from adpa.data.cache.documents import read_document, write_document
from adpa.data.cache.files import list_folder
from adpa.data.cache.locations import Location
from adpa.data.cache.shards import (
    damaged,
    join_keys,
    list_again,
    list_shards,
    open_shards,
    peek_shard,
    serialize,
    write_serialized,
)
from adpa.data.cache.signal_rows import SignalRow, plain_advantage_sums, plain_schema, read_plain_row
from adpa.errors import CacheError, DamagedFileError

SHARD_PREFIX = "signals"
TOP_K_LIMIT = 1 << 24
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ModelIdentity:
    """A checkpoint: its name, its Hub revision if it has one, and the digest of its weights."""

    name: str
    revision: str | None
    digest: str


@dataclass(frozen=True)
class Scoring:
    """The models and the settings that signals come from.

    The id is the digest of everything that can change a number. It contains the digest of a model's weights, but not
    its name and revision: a checkpoint may move without losing its signals.

    Attributes:
        teacher: the model that gives the probabilities.
        reference: the model whose log-probabilities are subtracted for advantages.
        vocabulary: digest of their vocabulary.
        top_k: ids kept for each response token, K.
        dtype: the dtype that the models compute in.
        engine: the program that runs them.
        top_p: keep the fewest ids with this mass, at most K of them.
        lossy: whether log-probabilities and advantages are rounded as ``rounding.py`` says.
    """

    teacher: ModelIdentity
    reference: ModelIdentity | None
    vocabulary: str
    top_k: int
    dtype: str
    engine: str
    top_p: float = 1.0
    lossy: bool = False

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits."""
        identity = _described(self) | {
            "teacher": self.teacher.digest,
            "reference": self.reference.digest if self.reference else None,
        }
        return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    def folder(self, cache: Location) -> Location:
        """The folder of the scoring in a cache."""
        return cache / "scorings" / self.id

    def describe(self) -> str:
        """One line for a user who has to choose among scorings."""
        return f"{self.id}: {self.settings}"

    @property
    def settings(self) -> str:
        """The models and settings in words."""
        reference = f", reference {self.reference.name}" if self.reference else ", no reference"
        nucleus = f", P = {self.top_p:g}" if self.top_p < 1 else ""
        lossy = ", lossy" if self.lossy else ""
        return f"teacher {self.teacher.name}{reference}, K = {self.top_k}{nucleus}{lossy}, {self.dtype}, {self.engine}"


TYPES = {"vocabulary": str, "top_k": int, "dtype": str, "engine": str, "top_p": float, "lossy": bool}
DEFAULTS = {field.name: field.default for field in fields(Scoring) if field.default is not MISSING}


class SignalTable:
    """Signal rows of any number of shards, plain and compact; a row is located by key and decoded when it is read."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = [table for table in tables if len(table)]
        self._ends = np.cumsum([len(table) for table in self._tables])
        self._keys = join_keys(table["key"] for table in self._tables)

    def __len__(self) -> int:
        return len(self._keys)

    def locate(self, keys: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """The row number of each key, −1 for a missing key; int64 [len(keys)]."""
        numbers = pc.index_in(keys, value_set=self._keys)
        return pc.fill_null(numbers, -1).to_numpy().astype(np.int64)

    def keys(self) -> set[bytes]:
        """The keys of all rows."""
        return set(self._keys.to_pylist())

    def row(self, number: int) -> SignalRow:
        """The row with a number from ``locate``.

        Raises:
            DamagedFileError: it cannot be decoded.
        """
        assert 0 <= number < len(self._keys), "a sequence without its row"
        shard = int(np.searchsorted(self._ends, number, side="right"))
        table = self._tables[shard]
        place = number - (int(self._ends[shard]) - len(table))
        return read_compact_row(table, place) if is_compact(table.schema) else read_plain_row(table, place)

    def advantage_sums(self, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
        """Σ_t of ``SignalRow.token_advantages`` of each row with a number from ``locate``; decodes nothing else.

        Raises:
            DamagedFileError: the advantages cannot be decoded, or a row has none.
        """
        assert (numbers >= 0).all(), "a sequence without its row"
        wanted, sums = np.zeros(len(self), dtype=bool), np.zeros(len(self))
        wanted[numbers] = True
        for table, end in zip(self._tables, self._ends, strict=True):
            for place in range(0, len(table), ROWS_AT_ONCE):
                rows = table.slice(place, ROWS_AT_ONCE)
                here = slice(end - len(table) + place, end - len(table) + place + len(rows))
                if wanted[here].any():
                    sums[here] = _advantage_sums(rows)
        return sums[numbers]


def _advantage_sums(table: pa.Table) -> NDArray[np.float64]:
    try:
        return compact_advantage_sums(table) if is_compact(table.schema) else plain_advantage_sums(table)
    except (LookupError, TypeError, ValueError, OSError) as error:
        key = table["key"][0].as_py().hex()
        raise DamagedFileError(
            f"the advantages of the signal row {key} or of one soon after it cannot be decoded: {error}",
            "run adpa cache verify --repair",
        ) from error


def write_scoring(cache: Location, scoring: Scoring) -> None:
    """Writes the description of a scoring into a cache; changes nothing if the cache has it."""
    path = scoring.folder(cache) / "scoring.json"
    if not path.exists():
        write_document(path, _described(scoring))


def read_scorings(cache: Location) -> Iterator[Scoring]:
    """Reads the description of every scoring of a cache.

    Raises:
        CacheError: a description is of a newer format.
        DamagedFileError: a description differs from what was written, or from the id of its folder.
    """
    for folder in list_folder(cache / "scorings"):
        try:
            yield read_scoring_file(folder / "scoring.json")
        except (FileNotFoundError, NotADirectoryError):
            continue


def read_scoring(cache: Location, scoring_id: str) -> Scoring:
    """Reads the description of a scoring that should be in a cache.

    Raises:
        FileNotFoundError: it is not in the cache.
        CacheError: it is of a newer format.
        DamagedFileError: it differs from what was written, or from the id of its folder.
    """
    return read_scoring_file(cache / "scorings" / scoring_id / "scoring.json")


def read_scoring_file(path: Location) -> Scoring:
    """Reads the description of a scoring.

    Raises:
        FileNotFoundError: it does not exist.
        CacheError: it is of a newer format.
        DamagedFileError: it differs from what was written, or from the id of its folder.
    """
    described, proved = read_document(path)
    unknown = sorted(described.keys() - {field.name for field in fields(Scoring)})
    if proved and unknown:
        raise CacheError(f"{path}: of a newer format: it has the unknown field {unknown[0]!r}", "install a newer adpa")
    try:
        reference = described.pop("reference")
        scoring = Scoring(
            teacher=ModelIdentity(**described.pop("teacher")),
            reference=ModelIdentity(**reference) if reference else None,
            **described,
        )
        scoring_id = scoring.id
        possible = 1 <= scoring.top_k <= TOP_K_LIMIT
        typed = all(
            type(getattr(scoring, field.name)) is TYPES[field.name] for field in fields(Scoring) if field.name in TYPES
        )
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if scoring_id != path.parent.name:
        raise damaged(path, f"describes {scoring_id}")
    if not typed or not 0 < scoring.top_p <= 1:
        raise damaged(path, "a field has a value of the wrong type")
    if not possible:
        raise damaged(path, f"its top_k is {scoring.top_k}; expected 1 to {TOP_K_LIMIT}, as no vocabulary is larger")
    return scoring


def write_signals(cache: Location, scoring: Scoring, rows: Sequence[SignalRow]) -> tuple[Location, int]:
    """Adds a shard of rows to a scoring, and returns it and its size in bytes."""
    payload = serialize(compact_table(rows, scoring.top_k, scoring.lossy))
    return write_serialized(scoring.folder(cache), SHARD_PREFIX, payload), int(payload.size)


def encoded_bytes(rows: Sequence[SignalRow], scoring: Scoring) -> int:
    """The size in bytes of the file that ``write_signals`` would write."""
    return int(serialize(compact_table(rows, scoring.top_k, scoring.lossy, measured=False)).size)


def read_signals(cache: Location, scoring: Scoring) -> SignalTable:
    """Opens every row of a scoring.

    Raises:
        CacheError: a shard is of a newer format.
        DamagedFileError: a shard differs from what was written, or its columns are not those of the scoring.
    """
    shards = open_shards(scoring.folder(cache), SHARD_PREFIX)
    return SignalTable(check_signals(path, table, scoring) for path, table in shards)


def peek_signals(cache: Location, scoring: Scoring) -> SignalTable:
    """Opens every row of a scoring without computing digests, where ``read_signals`` has checked them just before.

    Raises:
        CacheError: a shard is of a newer format.
        DamagedFileError: a shard is not a table, or its columns are not those of the scoring.
    """
    folder = scoring.folder(cache)

    def peek() -> list[pa.Table]:
        return [check_signals(path, peek_shard(path), scoring) for path in list_shards(folder, SHARD_PREFIX)]

    return SignalTable(list_again(folder, peek))


def check_signals(path: Location, table: pa.Table, scoring: Scoring) -> pa.Table:
    """Checks that a shard has the columns of a scoring's signals, and returns its table.

    Raises:
        CacheError: it is of a newer format.
        DamagedFileError: they are not.
    """
    if is_compact(table.schema):
        check_encoding(path, table.schema)
        whole = table.schema.equals(compact_schema(scoring.top_k, scoring.lossy), check_metadata=True)
    else:
        whole = table.schema.equals(plain_schema(scoring.top_k)) and not scoring.lossy and scoring.top_p == 1
    if not whole:
        raise damaged(path, "its columns are not those of its scoring's signals")
    return table


def _described(scoring: Scoring) -> dict[str, Any]:
    """The fields of a description. A field that a later version added is left out if it has its default."""
    return {name: value for name, value in asdict(scoring).items() if name not in DEFAULTS or value != DEFAULTS[name]}

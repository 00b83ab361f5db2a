"""Counts the rows that a stopped run left, apart from those of other runs.

A run writes its response sets before it scores them. So a set of which only some responses are scored belongs to a run
that has not ended. The chosen and rejected responses of one data set are scored together: they count as one set.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseSet, peek_response_set
from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.shards import join_keys
from adpa.data.cache.signals import SignalTable
from adpa.data.sequences import TokenIds, sequence_key
from adpa.errors import CacheError


@dataclass(frozen=True)
class Resumed:
    """What a stopped run had done of the work of this one.

    Attributes:
        sequences: sequences that it had scored.
        halves: sequences that the teacher had scored, and the reference had not.
        samples: responses that it had sampled.
    """

    sequences: int = 0
    halves: int = 0
    samples: int = 0


def peek_sets(paths: Iterable[Location]) -> list[ResponseSet]:
    """The response sets of some files, without those that have vanished or cannot be read: they count as not there."""
    sets = []
    for path in paths:
        with suppress(FileNotFoundError, CacheError):
            sets.append(peek_response_set(path))
    return sets


def count_sequences(sets: Iterable[ResponseSet], signals: SignalTable, keys: Sequence[bytes]) -> int:
    """How many of some rows a stopped run scored: those that no finished set has.

    Args:
        sets: the response sets that the cache had before the run.
        signals: the rows of the run's scoring.
        keys: keys of rows among them.
    """
    groups: dict[str, list[pa.ChunkedArray]] = defaultdict(list)
    for responses in sets:
        origin = asdict(replace(responses.info, name="chosen", truncated_responses=0))  # the same for chosen, rejected
        groups[json.dumps(origin, sort_keys=True)].append(responses.table["key"])
    finished = []
    for columns in groups.values():
        scored = [signals.locate(column) >= 0 for column in columns]
        if not any(mask.any() and not mask.all() for mask in scored):
            finished += [column for column, mask in zip(columns, scored, strict=True) if mask.all()]
    return _count_others(keys, finished)


def count_samples(
    sets: Iterable[ResponseSet], samples: Iterable[SampleRequest], answers: Mapping[bytes, TokenIds]
) -> int:
    """How many samples a stopped run made: those of which no response set was made.

    Args:
        sets: the response sets that the cache had before the run.
        samples: the samples of the run.
        answers: the responses that the cache had before the run, by the keys of their requests.
    """
    made = {one.key: sequence_key(one.prompt_ids, answers[one.key]) for one in samples if one.key in answers}
    return _count_others(list(made.values()), [one.table["key"] for one in sets if one.info.sampling is not None])


def _count_others(keys: Sequence[bytes], columns: Iterable[pa.ChunkedArray]) -> int:
    """How many keys are in none of the columns."""
    known = pc.is_in(pa.array(keys, pa.binary(16)), value_set=join_keys(columns))
    return len(keys) - int(pc.sum(known).as_py() or 0)

"""Lists a cache: response sets, scorings, samples, tokenizers, and the remains of killed runs.

It reads file sizes, Arrow metadata and the column ``key``. It decodes no signal and computes no digest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from adpa.data.cache.compact import RoundingErrors, rounding_errors
from adpa.data.cache.format import check_cache
from adpa.data.cache.inventory import CacheFile, list_files
from adpa.data.cache.locations import Location
from adpa.data.cache.responses import ResponseSet, ResponseSetInfo, peek_response_set
from adpa.data.cache.samples import samples_folder
from adpa.data.cache.set_records import SetRecord
from adpa.data.cache.shards import join_keys, list_again, peek_keys, peek_shard
from adpa.data.cache.signals import Scoring, read_scorings
from adpa.errors import CacheError, DamagedFileError
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import CacheArgument


@dataclass(frozen=True)
class ListedSet:
    """A response set.

    Attributes:
        name: its name and id.
        rows: its responses.
        tokens: their tokens, without the prompts'.
        prompt_tokens: the tokens of the prompts; a prompt counts once for each of its responses.
        bytes: size of its file.
        info: how it was made.
        record: from which data, and when; none for a set of an older version.
        scored: the number of its responses in each scoring of its vocabulary, by the id of the scoring.
    """

    name: str
    rows: int
    tokens: int
    prompt_tokens: int
    bytes: int
    info: ResponseSetInfo
    record: SetRecord | None
    scored: dict[str, int]


@dataclass(frozen=True)
class ListedScoring:
    """A scoring.

    Attributes:
        id: its id.
        scoring: its models and settings.
        rows: token sequences with signals.
        repeated: rows with the key of another row (two runs scored the same); ``adpa cache pack`` drops them.
        unneeded: rows that no response set needs; ``adpa cache gc`` removes them.
        tokens: response tokens of the rows that a set needs.
        shards: files of signals.
        bytes: their size.
        bytes_per_token: bytes per response token, in the files whose rows are all needed; none without such files.
        pending: rows that wait for the reference.
        pending_bytes: size of their files.
        rounding: the rounding errors of a lossy scoring; none for an exact one.
    """

    id: str
    scoring: Scoring
    rows: int
    repeated: int
    unneeded: int
    tokens: int
    shards: int
    bytes: int
    bytes_per_token: float | None
    pending: int
    pending_bytes: int
    rounding: RoundingErrors | None


@dataclass(frozen=True)
class ListedSamples:
    """The samples of one choice of settings: the sets made of them, the rows, and the files with their size."""

    id: str
    sets: list[str]
    rows: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class ListedTokenizer:
    """A tokenizer: its digest, the sets that were made with it, and the size of its files."""

    digest: str
    sets: list[str]
    bytes: int


@dataclass(frozen=True)
class ListedFiles:
    """The number of files of a kind, and their size."""

    files: int
    bytes: int


@dataclass(frozen=True)
class CacheListing:
    """The result of ``list_cache``.

    Attributes:
        cache: the cache.
        sets: the response sets, the newest first.
        scorings: the scorings.
        samples: the samples.
        tokenizers: the tokenizers.
        undescribed: signals that cannot be read, because the description of their scoring is missing.
        unfinished: temporary files of running or killed processes.
        damaged: files that ``adpa cache verify --repair`` set aside.
        unknown: places of files that do not belong to a cache.
        unreadable: a line about each file that could not be read.
        total: all files.
    """

    cache: str
    sets: list[ListedSet]
    scorings: list[ListedScoring]
    samples: list[ListedSamples]
    tokenizers: list[ListedTokenizer]
    undescribed: ListedFiles
    unfinished: ListedFiles
    damaged: ListedFiles
    unknown: list[str]
    unreadable: list[str]
    total: ListedFiles


@takes_options
def list_cache(cache: CacheArgument) -> CacheListing:
    """List what a cache holds, and who made it.

    The list has the response sets and scorings with their rows, tokens and bytes, and everything else that takes
    space. It reads sizes and keys alone, so that it is quick on large caches; ``adpa cache verify`` reads everything.

    Raises:
        CacheError: the cache does not exist.
        DamagedFileError: the description of a scoring is damaged.
    """
    check_cache(cache)
    return list_again(cache, partial(_list_cache, cache))


def _list_cache(cache: Location) -> CacheListing:
    files = list_files(cache)
    peek = _Peek([])
    peeked = [(file, peek.response_set(file)) for file in files if file.kind == "response set"]
    readable = [(file, responses) for file, responses in peeked if responses is not None]
    counting = {one.shard_prefix(): (file, one) for file, one in sorted(readable, key=lambda each: each[1].time)}
    sets = dict(sorted(counting.items(), key=lambda each: each[1][1].time, reverse=True))
    signals = {
        scoring: [
            (file, keys)
            for file in files
            if file.kind == "signals" and file.owner == scoring.id and (keys := peek.keys(file)) is not None
        ]
        for scoring in read_scorings(cache)
    }
    return CacheListing(
        cache=str(cache),
        sets=[_list_set(name, file, responses, signals) for name, (file, responses) in sets.items()],
        scorings=[
            _list_scoring(scoring, shards, [responses for _, responses in sets.values()], files, peek)
            for scoring, shards in signals.items()
        ],
        samples=_list_samples(cache, files, {name: responses for name, (_, responses) in sets.items()}, peek),
        tokenizers=[
            ListedTokenizer(
                digest,
                [name for name, (_, responses) in sets.items() if responses.info.tokenizer == digest],
                sum(file.size for file in files if file.kind == "tokenizer" and file.owner == digest),
            )
            for digest in sorted({file.owner for file in files if file.kind == "tokenizer"})
        ],
        undescribed=_count(
            [
                file
                for file in files
                if file.kind in ("signals", "pending") and file.owner not in {scoring.id for scoring in signals}
            ]
        ),
        unfinished=_count([file for file in files if file.kind == "unfinished"]),
        damaged=_count([file for file in files if file.kind == "damaged"]),
        unknown=[file.place for file in files if file.kind == "unknown"],
        unreadable=peek.unreadable,
        total=_count(files),
    )


@dataclass
class _Peek:
    """Opens files; notes those that cannot be read, and returns ``None`` for them."""

    unreadable: list[str]

    def response_set(self, file: CacheFile) -> ResponseSet | None:
        try:
            return peek_response_set(file.path)
        except CacheError as error:
            self.unreadable.append(str(error))
            return None

    def keys(self, file: CacheFile) -> pa.ChunkedArray | None:
        try:
            return peek_keys(file.path)
        except DamagedFileError as error:
            self.unreadable.append(str(error))
            return None


def _list_set(
    name: str,
    file: CacheFile,
    responses: ResponseSet,
    signals: dict[Scoring, list[tuple[CacheFile, pa.ChunkedArray]]],
) -> ListedSet:
    return ListedSet(
        name=name,
        rows=len(responses),
        tokens=_sum(pc.list_value_length(responses.table["response_ids"])),
        prompt_tokens=_sum(pc.list_value_length(responses.table["prompt_ids"])),
        bytes=file.size,
        info=responses.info,
        record=responses.record,
        scored={
            scoring.id: _sum(pc.is_in(responses.table["key"], value_set=join_keys([keys for _, keys in shards])))
            for scoring, shards in signals.items()
            if scoring.vocabulary == responses.info.vocabulary
        },
    )


def _list_scoring(
    scoring: Scoring,
    shards: Sequence[tuple[CacheFile, pa.ChunkedArray]],
    sets: Sequence[ResponseSet],
    files: Sequence[CacheFile],
    peek: _Peek,
) -> ListedScoring:
    needing = [responses.table for responses in sets if responses.info.vocabulary == scoring.vocabulary]
    needed = join_keys([table["key"] for table in needing])
    lengths = pa.chunked_array(
        [chunk for table in needing for chunk in pc.list_value_length(table["response_ids"]).chunks], pa.int32()
    )
    stored = join_keys([keys for _, keys in shards])
    distinct = pc.unique(stored)
    tokens, whole_bytes, whole_tokens = [], 0, 0
    for file, keys in shards:
        tokens.append(lengths.take(pc.index_in(keys, value_set=needed)))  # null where no set needs the row
        if tokens[-1].null_count == 0:
            whole_bytes += file.size
            whole_tokens += _sum(tokens[-1])
    pending = [file for file in files if file.kind == "pending" and file.owner == scoring.id]
    waiting = [keys for file in pending if (keys := peek.keys(file)) is not None]
    return ListedScoring(
        id=scoring.id,
        scoring=scoring,
        rows=len(distinct),
        repeated=len(stored) - len(distinct),
        unneeded=len(distinct) - _sum(pc.is_in(distinct, value_set=needed)),
        tokens=_sum(lengths.take(pc.index_in(distinct, value_set=needed))),
        shards=len(shards),
        bytes=sum(file.size for file, _ in shards),
        bytes_per_token=whole_bytes / whole_tokens if whole_tokens else None,
        pending=len(pc.unique(join_keys(waiting))),
        pending_bytes=sum(file.size for file in pending),
        rounding=rounding_errors(
            [table for file, _ in shards if "kl_error" in (table := peek_shard(file.path)).column_names]
        ),
    )


def _list_samples(
    cache: Location, files: Sequence[CacheFile], sets: dict[str, ResponseSet], peek: _Peek
) -> list[ListedSamples]:
    makers: dict[str, list[str]] = {}
    for name, responses in sets.items():
        if responses.info.sampling is not None:
            makers.setdefault(samples_folder(cache, responses.info.sampling).name, []).append(name)
    listed = []
    for owner in sorted({file.owner for file in files if file.kind == "samples"}):
        own = [file for file in files if file.kind == "samples" and file.owner == owner]
        keys = [column for file in own if (column := peek.keys(file)) is not None]
        rows = len(pc.unique(join_keys(keys)))
        listed.append(ListedSamples(owner, makers.get(owner, []), rows, len(own), sum(file.size for file in own)))
    return listed


def _sum(values: pa.ChunkedArray | pa.Array) -> int:
    return pc.sum(values).as_py() or 0


def _count(files: Sequence[CacheFile]) -> ListedFiles:
    return ListedFiles(len(files), sum(file.size for file in files))

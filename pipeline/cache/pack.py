"""Many small files of signals or samples, written again as few large ones; no row is changed.

A new file is written and synced before the old ones go, and both say the same, so that a kill at any moment leaves a
cache that is whole. The old files whose rows a new one has go at once: it takes the room of one new file. Readers see
the first of the rows with one key, in the order of the files' names; after packing, a key stands once. So files that
have a key in common go when all of them are written, from the last name to the first: the row that was seen goes last.
Any number of processes may pack a folder, with ``adpa cache gc`` beside them. Each removes only files that it has
listed, when it has itself written all of their keys to files with names that never were before. So if
B deletes A's file, B listed the folder after A; the files of the process that listed it last survive.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from adpa.data.cache import samples, signals
from adpa.data.cache.compact import compact_schema, compact_table
from adpa.data.cache.directories import check_writable
from adpa.data.cache.format import check_cache, prepare_cache
from adpa.data.cache.inventory import list_files
from adpa.data.cache.locations import Location
from adpa.data.cache.shards import (
    join_keys,
    list_again,
    list_shards,
    peek_keys,
    peek_shard,
    read_shard,
    remove_file,
    write_replacement,
)
from adpa.data.cache.signals import Scoring, SignalTable, check_signals, read_scorings
from adpa.pipeline.options import CacheArgument
from adpa.progress import progress

GOAL = 256 << 20  # bytes of a file; half of that is enough to be left alone
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackedFolder:
    """What became of a folder's files.

    Attributes:
        folder: its place in the cache.
        files_before: files that there were.
        files: files that there are.
        bytes_before: their size before.
        bytes: their size now.
        repeated: rows that said again what another one says, and went.
    """

    folder: str
    files_before: int
    files: int
    bytes_before: int
    bytes: int
    repeated: int


@dataclass(frozen=True)
class PackReport:
    """What ``pack_cache`` did: the folders whose files changed, and how many were packed well before."""

    cache: str
    packed: list[PackedFolder]
    untouched: int


def pack_cache(cache: CacheArgument) -> PackReport:
    """Write many small files as few large ones; no row changes.

    Signals of older versions of the format are written in the newest one, and a row that stands twice stays once.
    It takes the room of one new file, about 256 MiB, and of all files with rows that stand twice. Runs may read and
    write the cache meanwhile.

    Raises:
        CacheError: there is no cache, or a file of it is a link to nothing.
        DamagedFileError: a file is damaged.
        OptionError: the cache cannot be written.
    """
    check_cache(cache)
    check_writable("CACHE", cache)
    prepare_cache(cache)
    packed = []
    for scoring in read_scorings(cache):
        folder = scoring.folder(cache)
        check = partial(check_signals, scoring=scoring)
        list_again(folder, partial(_check_columns, folder, signals.SHARD_PREFIX, check))
        packed.append(pack_folder(folder, signals.SHARD_PREFIX, _schema(scoring), partial(_encode, scoring)))
    for owner in sorted({file.owner for file in list_files(cache) if file.kind == "samples"}):
        folder = cache / "samples" / owner
        list_again(folder, partial(_check_columns, folder, samples.SHARD_PREFIX, samples.check_samples))
        packed.append(pack_folder(folder, samples.SHARD_PREFIX, samples.SCHEMA, _without_metadata))
    changed = [found for found in packed if found is not None]
    return PackReport(str(cache), changed, len(packed) - len(changed))


def pack_folder(
    folder: Location,
    prefix: str,
    schema: pa.Schema,
    encode: Callable[[pa.Table], Iterator[pa.Table]],
    goal: int = GOAL,
) -> PackedFolder | None:
    """Packs the shards of a folder; ``None`` where there is nothing to do.

    Args:
        folder: where they lie.
        prefix: how their names begin.
        schema: what shards are written with now.
        encode: gives the rows of a table with another schema as tables with this one.
        goal: bytes of a new shard, which may be more by what the last of the old ones brings.

    Raises:
        CacheError: a file is listed again and again, but is not there.
        DamagedFileError: a file is damaged.
    """
    return list_again(folder, partial(_pack_once, folder, prefix, schema, encode, goal))


def _pack_once(
    folder: Location, prefix: str, schema: pa.Schema, encode: Callable[[pa.Table], Iterator[pa.Table]], goal: int
) -> PackedFolder | None:
    paths = list_shards(folder, prefix)
    sizes = {path: path.stat().st_size for path in paths}
    first, shared = _first_rows(paths)
    other = {path for path in paths if not peek_shard(path).schema.equals(schema, check_metadata=True)}
    chosen = [path for path in paths if sizes[path] < goal // 2 or path in other | shared]
    if len(chosen) < 2 and not other | shared:
        return None
    written: list[Location] = []

    def rewrite(old: list[Location]) -> Iterator[list[Location]]:
        """Writes their rows as new files; after each, gives the old ones that it makes needless."""
        group: list[pa.Table] = []
        needless: list[Location] = []
        size = 0
        for path in old:
            rows = read_shard(path).filter(pa.array(first[path]))
            for table in encode(rows) if path in other else [rows]:
                assert table.schema == schema
                if size >= goal:
                    written.append(write_replacement(folder, prefix, pa.concat_tables(group)))
                    yield needless
                    group, size, needless = [], 0, []
                if len(table):
                    group.append(table)
                    size += table.nbytes
            needless.append(path)
            advance(sizes[path])
        if group:
            written.append(write_replacement(folder, prefix, pa.concat_tables(group)))
        yield needless

    with progress(f"packing {folder.name}: bytes", sum(sizes[path] for path in chosen)) as advance:
        late, safe = [], 0
        try:
            for needless in rewrite(sorted(chosen, key=shared.__contains__)):  # those that have to wait come last
                if shared.isdisjoint(needless):
                    safe = len(written)
                    for path in needless:
                        remove_file(path)
                else:
                    late += needless
        except BaseException:
            for path in written[safe:]:
                remove_file(path)
            raise
        for path in late[::-1]:
            remove_file(path)
    untouched = sizes.keys() - set(chosen)
    return PackedFolder(
        folder=f"{folder.parent.name}/{folder.name}",
        files_before=len(paths),
        files=len(untouched) + len(written),
        bytes_before=sum(sizes.values()),
        bytes=sum(path.stat().st_size for path in [*untouched, *written]),
        repeated=sum(int((~mask).sum()) for mask in first.values()),
    )


def _first_rows(paths: list[Location]) -> tuple[dict[Location, NDArray[np.bool_]], set[Location]]:
    """Which rows of each shard readers see, the first with their key; and the shards with a key that stands twice."""
    columns = [peek_keys(path) for path in paths]
    if not columns:
        return {}, set()
    keys = join_keys(columns)
    places = pc.index_in(keys, value_set=keys).to_numpy()
    ends = np.cumsum([len(column) for column in columns])[:-1]
    first = np.split(places == np.arange(len(keys)), ends)
    repeated = np.split(np.bincount(places, minlength=len(keys))[places] > 1, ends)
    return (
        dict(zip(paths, first, strict=True)),
        {path for path, mask in zip(paths, repeated, strict=True) if mask.any()},
    )


def _check_columns(folder: Location, prefix: str, check: Callable[[Location, pa.Table], object]) -> None:
    """What readers refuse is not packed into what they accept."""
    for path in list_shards(folder, prefix):
        check(path, peek_shard(path))


def _schema(scoring: Scoring) -> pa.Schema:
    return compact_schema(scoring.top_k, scoring.lossy)


def _encode(scoring: Scoring, table: pa.Table) -> Iterator[pa.Table]:
    """Signal rows of another encoding, as they are written now."""
    read = SignalTable([table])
    for start in range(0, len(read), ROWS_AT_ONCE):
        rows = [read.row(number) for number in range(start, min(start + ROWS_AT_ONCE, len(read)))]
        yield compact_table(rows, scoring.top_k, scoring.lossy)


def _without_metadata(table: pa.Table) -> Iterator[pa.Table]:
    yield table.replace_schema_metadata()

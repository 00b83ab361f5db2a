"""Rewrites many small files of signals or samples as few large ones; no row changes.

A new file is written and synced before the old files are removed, and has the same rows. So a kill at any moment leaves
a whole cache. Old files are removed as soon as a new file has their rows, so that packing needs space for one new file.

Of several rows with one key, readers use the first in the order of the file names; after packing, each key exists once.
So files that share a key are removed last, after all new files are written, from the last name to the first: the row in
use goes last.

Any number of processes may pack a folder, and ``adpa cache gc`` may run at the same time. Each process removes only
files of its own listing, after it has written all of their keys to files with new, unique names. So if B deletes A's
file, B listed the folder after A; the files of the process that listed last survive.
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
from adpa.data.cache.files import remove_file
from adpa.data.cache.format import check_cache, prepare_cache
from adpa.data.cache.inventory import list_files
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.shards import (
    join_keys,
    list_again,
    list_shards,
    peek_keys,
    peek_shard,
    read_shard,
    write_replacement,
)
from adpa.data.cache.signals import Scoring, SignalTable, check_signals, read_scorings
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import CacheArgument
from adpa.progress import progress

GOAL = 256 << 20  # bytes of a file; a file of half this size stays as it is
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class PackedFolder:
    """The files of a folder before and after packing.

    Attributes:
        folder: its place in the cache.
        files_before: number of files before.
        files: number of files now.
        bytes_before: their size before.
        bytes: their size now.
        repeated: rows that were dropped, because another row has the same key.
    """

    folder: str
    files_before: int
    files: int
    bytes_before: int
    bytes: int
    repeated: int


@dataclass(frozen=True)
class PackReport:
    """The folders that ``pack_cache`` changed, and the number of folders that needed no packing."""

    cache: str
    packed: list[PackedFolder]
    untouched: int


@takes_options
def pack_cache(cache: CacheArgument) -> PackReport:
    """Write many small files as few large ones; no row changes.

    Signals in older versions of the format are rewritten in the newest, and of repeated rows one stays. Packing needs
    space for one new file, about 256 MiB, and for all files with repeated rows. Runs may read and write the cache at
    the same time.

    Raises:
        CacheError: the cache does not exist, or a file in it is a broken link.
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
    changed = [folder for folder in packed if folder is not None]
    return PackReport(str(cache), changed, len(packed) - len(changed))


def pack_folder(
    folder: Location,
    prefix: str,
    schema: pa.Schema,
    encode: Callable[[pa.Table], Iterator[pa.Table]],
    goal: int = GOAL,
) -> PackedFolder | None:
    """Packs the shards of a folder; ``None`` if there is nothing to do.

    Args:
        folder: the folder.
        prefix: the beginning of the names of the shards.
        schema: the schema of new shards.
        encode: converts a table with another schema into tables with this schema.
        goal: bytes of a new shard; the last old file that goes into it may exceed them.

    Raises:
        CacheError: a file is in every listing but does not exist.
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
        """Writes the rows of old files as new files; after each, yields the old files that are no longer needed."""
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
            for needless in rewrite(sorted(chosen, key=shared.__contains__)):  # files that are removed late come last
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
    """Masks of the rows that readers use, the first with their key; and the shards with a repeated key."""
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
    """Checks every shard as readers do: packing must not turn a refused file into an accepted one."""
    for path in list_shards(folder, prefix):
        check(path, peek_shard(path))


def _schema(scoring: Scoring) -> pa.Schema:
    return compact_schema(scoring.top_k, scoring.lossy)


def _encode(scoring: Scoring, table: pa.Table) -> Iterator[pa.Table]:
    """Signal rows of another encoding in the current one."""
    read = SignalTable([table])
    for start in range(0, len(read), ROWS_AT_ONCE):
        rows = [read.row(number) for number in range(start, min(start + ROWS_AT_ONCE, len(read)))]
        yield compact_table(rows, scoring.top_k, scoring.lossy)


def _without_metadata(table: pa.Table) -> Iterator[pa.Table]:
    yield table.replace_schema_metadata()

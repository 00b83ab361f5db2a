"""Many small files of signals or samples, written again as few large ones; no row is changed.

New files are written and synced before the old ones go, and both say the same, so that a kill at any moment leaves a
cache that is whole. Readers see the first of the rows with one key, in the order of the files' names. After packing, a
key stands once. Until then the old files go from the last name to the first: the row that was seen first goes last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from typing_extensions import Doc

from adpa.data import samples, signals
from adpa.data.compact import compact_schema, compact_table
from adpa.data.format import check_cache, prepare_cache
from adpa.data.inventory import list_files
from adpa.data.locations import Location
from adpa.data.shards import list_shards, peek_shard, read_shard, remove_file, write_shard
from adpa.data.signals import Scoring, SignalTable, read_scorings
from adpa.pipeline.directories import check_writable
from adpa.pipeline.progress import progress

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


def pack_cache(cache: Annotated[Location, Doc("Directory or URL of the teacher-signal cache.")]) -> PackReport:
    """Write a cache's many small files as few large ones, without changing any row.

    Signals of older versions of the format are written in the newest one, and a row that stands twice stays once.
    Until the old files go, the new ones take as much room again.

    Raises:
        CacheError: there is no cache.
        DamagedFileError: a file is damaged.
        OptionError: the cache cannot be written.
    """
    check_cache(cache)
    check_writable("CACHE", cache)
    prepare_cache(cache)
    packed = [
        pack_folder(scoring.folder(cache), signals.SHARD_PREFIX, _schema(scoring), partial(_encode, scoring))
        for scoring in read_scorings(cache)
    ]
    for owner in sorted({file.owner for file in list_files(cache) if file.kind == "samples"}):
        packed.append(pack_folder(cache / "samples" / owner, samples.SHARD_PREFIX, samples.SCHEMA, _as_it_is))
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
    """
    paths = list_shards(folder, prefix)
    sizes = {path: path.stat().st_size for path in paths}
    first = _first_rows(paths)
    other = {path for path in paths if not peek_shard(path).schema.equals(schema, check_metadata=True)}
    again = {path for path in paths if not first[path].all()}
    chosen = [path for path in paths if sizes[path] < goal // 2 or path in other | again]
    if len(chosen) < 2 and not other | again:
        return None
    written: list[Location] = []
    group: list[pa.Table] = []

    def flush() -> None:
        if group:
            written.append(write_shard(folder, prefix, pa.concat_tables(group)))
            group.clear()

    with progress(f"packing {folder.name}: bytes", sum(sizes[path] for path in chosen)) as advance:
        for path in chosen:
            rows = read_shard(path).filter(pa.array(first[path]))
            for table in encode(rows) if path in other else [rows]:
                assert table.schema == schema
                group += [table] if len(table) else []
                if sum(part.nbytes for part in group) >= goal:
                    flush()
            advance(sizes[path])
        flush()
    for path in reversed(chosen):
        if path not in written:
            remove_file(path)
    left = [path for path in paths if path not in chosen]
    return PackedFolder(
        folder=f"{folder.parent.name}/{folder.name}",
        files_before=len(paths),
        files=len(left) + len(written),
        bytes_before=sum(sizes.values()),
        bytes=sum(path.stat().st_size for path in [*left, *written]),
        repeated=sum(int((~mask).sum()) for mask in first.values()),
    )


def _first_rows(paths: list[Location]) -> dict[Location, NDArray[np.bool_]]:
    """Which rows of each shard readers see: those that are the first with their key."""
    columns = [peek_shard(path)["key"] for path in paths]
    keys = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.binary(16))
    seen = pc.index_in(keys, value_set=keys).to_numpy() == np.arange(len(keys))
    ends = np.cumsum([len(column) for column in columns])[:-1]
    return dict(zip(paths, np.split(seen, ends), strict=True)) if paths else {}


def _schema(scoring: Scoring) -> pa.Schema:
    return compact_schema(scoring.top_k, scoring.lossy)


def _encode(scoring: Scoring, table: pa.Table) -> Iterator[pa.Table]:
    """Signal rows of another encoding, as they are written now."""
    read = SignalTable([table])
    for start in range(0, len(read), ROWS_AT_ONCE):
        rows = [read.row(number) for number in range(start, min(start + ROWS_AT_ONCE, len(read)))]
        yield compact_table(rows, scoring.top_k, scoring.lossy)


def _as_it_is(table: pa.Table) -> Iterator[pa.Table]:
    yield table

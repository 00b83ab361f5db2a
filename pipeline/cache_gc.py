"""What a cache keeps and no response set needs: found, listed with its bytes, and removed when asked to."""

import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import Doc

from adpa.data.format import check_cache, prepare_cache
from adpa.data.inventory import CacheFile, FileKind, list_files
from adpa.data.locations import Location
from adpa.data.removal import remove_files
from adpa.data.responses import ResponseSet, read_response_sets
from adpa.data.samples import samples_folder
from adpa.data.shards import peek_shard, read_shard, serialize, write_shard
from adpa.data.signals import Scoring, read_scorings
from adpa.pipeline.directories import check_writable
from adpa.pipeline.progress import progress

DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Garbage:
    """A file that no response set needs, or not all of it.

    Attributes:
        place: the file's place in the cache.
        kind: what it is.
        reason: why it can go.
        rows: rows that go; none for what has no rows.
        kept: rows that stay, in a new file.
        bytes: what this frees.
    """

    place: str
    kind: FileKind
    reason: str
    rows: int | None
    kept: int
    bytes: int


@dataclass(frozen=True)
class GarbageReport:
    """What ``collect_garbage`` found.

    Attributes:
        cache: the cache.
        garbage: what goes.
        bytes: what this frees.
        young: places of files that look like garbage, and stay because a run may be at work with them.
        done: whether it was removed.
    """

    cache: str
    garbage: list[Garbage]
    bytes: int
    young: list[str]
    done: bool


def collect_garbage(
    cache: Annotated[Location, Doc("Directory or URL of the teacher-signal cache.")],
    yes: Annotated[bool, Doc("Remove what is listed.")] = False,
) -> GarbageReport:
    """List what no response set of a cache needs, and remove it with --yes.

    To drop a response set, remove its file in CACHE/responses and run this. Rows of signals that no set needs go (a
    file that has others too is written anew without them), scorings without rows, tokenizers that no set names,
    samples of which no set was made, rows that waited for the reference and need not, temporary files of killed runs,
    and what was set aside in CACHE/damaged. What a run at work may be about to need stays for a day: temporary files,
    samples, tokenizers, and scorings without rows.

    Raises:
        CacheError: there is no cache.
        DamagedFileError: a file is damaged, so that it cannot be told what is needed.
        OptionError: the cache cannot be written.
    """
    check_cache(cache)
    check_writable("CACHE", cache)
    found = _Garbage(list_files(cache), _now(cache) - DAY)
    sets = list(read_response_sets(cache))
    for scoring in read_scorings(cache):
        found.of_scoring(scoring, sets)
    samplings = [responses.info.sampling for responses in sets]
    samples = {samples_folder(cache, sampling).name for sampling in samplings if sampling is not None}
    found.of_owners("samples", samples, "no response set was made of them")
    found.of_owners("tokenizer", {responses.info.tokenizer for responses in sets}, "no response set names it")
    found.others()
    if yes:
        prepare_cache(cache)
        with progress("removing: files", len(found.files)) as advance:
            for file, kept in found.files:
                if kept is not None:
                    write_shard(file.path.parent, file.path.name.partition("-")[0], kept)
                remove_files(cache, [file])
                advance(1)
    return GarbageReport(
        str(cache), found.garbage, sum(garbage.bytes for garbage in found.garbage), sorted(found.young), yes
    )


class _Garbage:
    """Notes what can go: whole files, and files with the rows that stay."""

    def __init__(self, files: Sequence[CacheFile], young: float) -> None:
        self.garbage: list[Garbage] = []
        self.files: list[tuple[CacheFile, pa.Table | None]] = []
        self.young: list[str] = []
        self._files = files
        self._young = young

    def of_scoring(self, scoring: Scoring, sets: Sequence[ResponseSet]) -> None:
        """Rows that no set of the scoring's vocabulary has; rows in waiting that are done, too; then the scoring."""
        needed = _keys(found.table for found in sets if found.info.vocabulary == scoring.vocabulary)
        own = [file for file in self._files if file.place.startswith(f"scorings/{scoring.id}/")]
        signals = [file for file in own if file.kind == "signals"]
        tables = {file: table for file in signals if (table := _peek(file)) is not None}
        stays = [self._rows(file, table, needed, "no response set needs it") for file, table in tables.items()]
        done = _keys(tables.values())
        waiting = needed.filter(pc.invert(pc.is_in(needed, value_set=done)))
        for file in own:
            if file.kind == "pending" and (table := _peek(file)) is not None:
                stays.append(self._rows(file, table, waiting, "done, or no response set needs it"))
        if own and not any(stays):  # one that appeared after the files were listed has none here
            left = [file for file in own if file.kind == "scoring"]
            self._unless_young(left, "it has no rows", max(file.changed for file in own))

    def of_owners(self, kind: FileKind, needed: set[str], reason: str) -> None:
        """Folders of files of a kind, but for those that are needed."""
        folders: dict[str, list[CacheFile]] = defaultdict(list)
        for file in self._files:
            if file.kind == kind and file.owner not in needed:
                folders[file.owner].append(file)
        for files in folders.values():
            self._unless_young(files, reason, max(file.changed for file in files))

    def others(self) -> None:
        """Temporary files, and damaged ones."""
        for file in self._files:
            if file.kind == "unfinished":
                self._unless_young([file], "left by a run that was killed", file.changed)
            elif file.kind == "damaged":
                self._whole(file, "damaged, and set aside")

    def _rows(self, file: CacheFile, table: pa.Table, needed: pa.ChunkedArray, reason: str) -> bool:
        """Notes the rows of a file that are not needed; says whether any stay."""
        wanted = pc.is_in(table["key"], value_set=needed)
        kept = pc.sum(wanted).as_py() or 0
        if kept == 0:
            self._whole(file, reason, len(table))
        elif kept < len(table):
            # Its digest is computed first, so that no damage gets a new one.
            rest = read_shard(file.path).filter(wanted)
            freed = file.size - serialize(rest).size
            self.garbage.append(Garbage(file.place, file.kind, reason, len(table) - kept, kept, freed))
            self.files.append((file, rest))
        return kept > 0

    def _whole(self, file: CacheFile, reason: str, rows: int | None = None) -> None:
        self.garbage.append(Garbage(file.place, file.kind, reason, rows, 0, file.size))
        self.files.append((file, None))

    def _unless_young(self, files: Sequence[CacheFile], reason: str, changed: float) -> None:
        if changed > self._young:
            self.young += [file.place for file in files]
            return
        for file in files:
            self._whole(file, reason)


def _peek(file: CacheFile) -> pa.Table | None:
    try:
        return peek_shard(file.path)
    except FileNotFoundError:  # a run that ended just now has removed it
        return None


def _keys(tables: Iterable[pa.Table]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for table in tables for chunk in table["key"].chunks], pa.binary(16))


def _now(cache: Location) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    path = cache / f".clock.{uuid.uuid4().hex}"
    path.write_bytes(b"")
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()

"""What a cache keeps and no response set needs: found, listed with its bytes, and removed when asked to."""

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import Doc

from adpa.data.cache.directories import check_writable
from adpa.data.cache.format import check_cache, prepare_cache
from adpa.data.cache.inventory import CacheFile, FileKind, list_files
from adpa.data.cache.locations import Location
from adpa.data.cache.removal import as_restored, find_restorable, remove_files, remove_unless, restore
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.cache.samples import samples_folder
from adpa.data.cache.shards import join_keys, list_folder, list_shards, peek_keys, read_shard, write_replacement
from adpa.data.cache.signals import Scoring, read_scorings
from adpa.errors import CacheError
from adpa.pipeline.options import CacheArgument, Group
from adpa.progress import progress

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
        bytes: what this frees; before it is removed, what it would free if all rows were of one size.
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
        repeated: places of files with rows that go, and stay because other files have rows of theirs, too: without them
            readers might see another one of two rows. ``adpa cache pack`` drops the one that is not seen.
        done: whether it was removed.
    """

    cache: str
    garbage: list[Garbage]
    bytes: int
    young: list[str]
    repeated: list[str]
    done: bool


def collect_garbage(
    cache: CacheArgument,
    yes: Annotated[bool, Doc("Remove what is listed."), Group.DECIDE] = False,
) -> GarbageReport:
    """List what no response set needs; --yes removes it.

    To drop a response set, remove its file in CACHE/responses and run this. Rows of signals that no set needs go (a
    file that has others too is written anew without them), scorings without rows, tokenizers that no set names,
    samples of which no set was made, rows that waited for the reference and need not, temporary files of killed runs,
    and what was set aside in CACHE/damaged. What a run at work may be about to need stays for a day: temporary files,
    samples, tokenizers, and scorings without rows. With --yes a day is told by the clock of the file system, else by
    this machine's. A file with rows that another file has, too, stays as it is: adpa cache pack drops them first. Other
    commands may run beside it on a file system; in an object store, which cannot rename, adpa
    precompute and adpa cache merge must not.

    Raises:
        CacheError: there is no cache, or a response set was set aside and is not there again.
        DamagedFileError: a file is damaged, so that it cannot be told what is needed.
        OptionError: the cache cannot be written, with ``yes``.
    """
    check_cache(cache)
    if yes:
        check_writable("CACHE", cache)
    needs = _Needs(cache)
    _check_sets_are_whole(cache, needs)
    if yes:
        prepare_cache(cache)
    young = (_now(cache) if yes else time.time()) - DAY
    files = list_files(cache)
    restorable = find_restorable(files)
    if yes and restorable:
        for file in restorable:
            restore(file, abandoned=file.changed <= young)
        files = list_files(cache)
    else:
        files = as_restored(files, restorable)
    needs.look()
    found = _Garbage(cache, needs, files, young)
    for scoring in read_scorings(cache):
        found.of_scoring(scoring)
    found.of_owners("samples", "no response set was made of them")
    found.of_owners("tokenizer", "no response set names it")
    found.others()
    garbage = [part for candidate in found.candidates for part in candidate.garbage]
    if yes:
        garbage = []
        with progress("removing: files", len(found.candidates)) as advance:
            for candidate in found.candidates:
                garbage += candidate.remove()
                advance(1)
    return GarbageReport(
        cache=str(cache),
        garbage=garbage,
        bytes=sum(found.bytes for found in garbage),
        young=sorted(found.young),
        repeated=sorted(found.repeated),
        done=yes,
    )


class _Needs:
    """What response sets need; a set that was seen once counts, whatever becomes of its file."""

    def __init__(self, cache: Location) -> None:
        self.sets: dict[str, ResponseSet] = {}
        self._cache = cache
        self._names: set[str] = set()
        self.look()

    def look(self) -> int:
        """Reads the sets if any has appeared; gives how many were ever seen."""
        names = {path.name for path in list_shards(self._cache / "responses")}
        if not names <= self._names:
            self.sets |= {found.id: found for found in read_response_sets(self._cache)}
            self._names |= names
        return len(self.sets)

    def keys(self, vocabulary: str) -> pa.ChunkedArray:
        """The keys of the sets of a vocabulary."""
        tables = [found.table for found in self.sets.values() if found.info.vocabulary == vocabulary]
        return join_keys(table["key"] for table in tables)

    def owners(self, kind: FileKind) -> set[str]:
        """The ids of the samples, or of the tokenizers, that sets were made of or with."""
        infos = [found.info for found in self.sets.values()]
        if kind == "tokenizer":
            return {info.tokenizer for info in infos}
        return {samples_folder(self._cache, info.sampling).name for info in infos if info.sampling is not None}


@dataclass(frozen=True)
class _Candidate:
    """What can go, as far as one knows, and what removes it and says what has gone."""

    garbage: list[Garbage]
    remove: Callable[[], list[Garbage]]


class _Garbage:
    """Notes what can go: whole files, and files with rows that stay."""

    def __init__(self, cache: Location, needs: _Needs, files: Sequence[CacheFile], young: float) -> None:
        self.candidates: list[_Candidate] = []
        self.young: list[str] = []
        self.repeated: list[str] = []
        self._cache = cache
        self._needs = needs
        self._files = files
        self._scorings: dict[str, list[CacheFile]] = defaultdict(list)
        for file in files:
            if file.place.startswith("scorings/"):
                self._scorings[file.owner].append(file)
        self._young = young

    def of_scoring(self, scoring: Scoring) -> None:
        """Rows that no set of the scoring's vocabulary has; rows in waiting that are done, too; then the scoring."""
        own = self._scorings[scoring.id]
        signals, pending = (_read_keys(own, kind) for kind in ("signals", "pending"))

        def wanted(keys: pa.ChunkedArray) -> pa.ChunkedArray:
            return pc.is_in(keys, value_set=self._needs.keys(scoring.vocabulary))

        done = join_keys(signals.values())
        done = done.filter(wanted(done))

        def awaited(keys: pa.ChunkedArray) -> pa.ChunkedArray:
            return pc.and_not(wanted(keys), pc.is_in(keys, value_set=done))

        stays = [
            *self._rows(signals, wanted, "no response set needs it", _repeated(signals.values())),
            *self._rows(pending, awaited, "done, or no response set needs it", _repeated([])),
        ]
        if own and not any(stays):  # one that appeared after the files were listed has none here
            left = [file for file in own if file.kind == "scoring"]
            folder = scoring.folder(self._cache)

            def has_rows() -> bool:
                return bool(list_shards(folder) or list_shards(folder / "pending"))

            self._unless_young(left, "it has no rows", max(file.changed for file in own), has_rows)

    def of_owners(self, kind: FileKind, reason: str) -> None:
        """Folders of files of a kind, but for those that are needed."""
        owners = self._needs.owners(kind)
        folders: dict[str, list[CacheFile]] = defaultdict(list)
        for file in self._files:
            if file.kind == kind and file.owner not in owners:
                folders[file.owner].append(file)
        for owner, files in folders.items():

            def needed(owner: str = owner) -> bool:
                self._needs.look()
                return owner in self._needs.owners(kind)

            changed = max(file.changed for file in files)
            if kind == "tokenizer" and isinstance(self._cache, Path):  # which is there as a whole, or not at all
                self._unless_young(files, reason, changed, needed, self._cache / "tokenizers" / owner)
            else:
                self._unless_young(files, reason, changed, needed)

    def others(self) -> None:
        """Temporary files, and damaged ones."""
        for file in self._files:
            if file.kind == "unfinished":
                self._unless_young([file], "left by a run that was killed", file.changed)
            elif file.kind == "damaged":
                self._whole([file], "damaged, and set aside", None, file.path)

    def _rows(
        self,
        files: dict[CacheFile, pa.ChunkedArray],
        wanted: Callable[[pa.ChunkedArray], pa.ChunkedArray],
        reason: str,
        repeated: pa.Array,
    ) -> list[bool]:
        """Notes the rows of some files that are not wanted; says of each file whether any stay.

        A file that keeps one of the ``repeated`` keys stays as it is: which row readers see is told by its name.
        """
        masks, start = wanted(join_keys(files.values())), 0
        stays = []
        for file, keys in files.items():
            mask, start = masks.slice(start, len(keys)), start + len(keys)
            kept = _count(mask)
            stays.append(kept > 0)
            gone = len(keys) - kept
            if gone and _has_any(keys.filter(mask), repeated):
                self.repeated.append(file.place)
            elif gone or not kept:
                freed = file.size * gone // len(keys) if kept else file.size
                garbage = Garbage(file.place, file.kind, reason, gone, kept, freed)
                remove = partial(self._remove_rows, file, garbage, mask, len(self._needs.sets), wanted, repeated)
                self.candidates.append(_Candidate([garbage], remove))
        return stays

    def _remove_rows(
        self,
        file: CacheFile,
        garbage: Garbage,
        mask: pa.ChunkedArray,
        sets: int,
        wanted: Callable[[pa.ChunkedArray], pa.ChunkedArray],
        repeated: pa.Array,
    ) -> list[Garbage]:
        """Removes the rows of a file that so many sets do not want, unless new ones do."""
        keys = _peek(file)
        if keys is None:
            return []
        now = self._needs.look()
        if now != sets:
            mask = wanted(keys)
        kept, size = _count(mask), file.size
        if kept == len(keys) > 0 or _has_any(keys.filter(mask), repeated):
            return []
        if kept:
            try:
                rest = read_shard(file.path).filter(mask)  # its digest is checked, so that no damage gets a new one
            except FileNotFoundError:
                return []
            size -= write_replacement(file.path.parent, file.path.name.partition("-")[0], rest).stat().st_size
        unwanted = keys.filter(pc.invert(mask))

        def needed() -> bool:
            return self._needs.look() != now and _count(wanted(unwanted)) > 0

        if not remove_unless(self._cache, file.path, needed):
            return []
        return [replace(garbage, rows=len(keys) - kept, kept=kept, bytes=size)]

    def _unless_young(
        self,
        files: Sequence[CacheFile],
        reason: str,
        changed: float,
        needed: Callable[[], bool] | None = None,
        folder: Path | None = None,
    ) -> None:
        if changed > self._young:
            self.young += [file.place for file in files]
        elif folder is not None:
            self._whole(files, reason, needed, folder)
        else:
            for file in files:
                self._whole([file], reason, needed, file.path)

    def _whole(
        self, files: Sequence[CacheFile], reason: str, needed: Callable[[], bool] | None, path: Location
    ) -> None:
        """Notes a file, or the files of a folder; ``needed`` says whether it is, once it is to go."""
        garbage = [Garbage(file.place, file.kind, reason, None, 0, file.size) for file in files]

        def remove() -> list[Garbage]:
            if needed is None:
                remove_files(self._cache, files)
            elif needed() or not remove_unless(self._cache, path, needed):
                return []
            return garbage

        self.candidates.append(_Candidate(garbage, remove))


def _check_sets_are_whole(cache: Location, needs: _Needs) -> None:
    """A set that was set aside must be there again: it cannot be told what it needs."""
    present = {found.shard_prefix() for found in needs.sets.values()}
    for path in list_folder(cache / "damaged" / "responses"):
        if path.stem.rpartition("-")[0] not in present:
            raise CacheError(
                f"{path}: a response set that was set aside; without it its rows would be taken for garbage",
                "run the same adpa precompute first, or remove this file",
            )


def _read_keys(files: Iterable[CacheFile], kind: FileKind) -> dict[CacheFile, pa.ChunkedArray]:
    """A copy of the keys of each shard of a kind, which holds no file open."""
    columns = ((file, _peek(file)) for file in files if file.kind == kind)
    return {file: keys.take(np.arange(len(keys))) for file, keys in columns if keys is not None}


def _peek(file: CacheFile) -> pa.ChunkedArray | None:
    try:
        return peek_keys(file.path)
    except FileNotFoundError:  # a run that ended just now has removed it
        return None


def _repeated(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    """The keys that more than one column has."""
    counted = join_keys(pa.chunked_array([pc.unique(column)]) for column in columns).value_counts()
    return counted.field("values").filter(pc.greater(counted.field("counts"), 1))


def _has_any(keys: pa.ChunkedArray, wanted: pa.Array) -> bool:
    return _count(pc.is_in(keys, value_set=wanted)) > 0


def _count(mask: pa.ChunkedArray) -> int:
    return pc.sum(mask).as_py() or 0


def _now(cache: Location) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    path = cache / f".clock.{uuid.uuid4().hex}"
    path.write_bytes(b"")
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()

"""Finds the files and rows of a cache that no response set needs; lists them, or removes them."""

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

from adpa.data.cache.files import list_folder
from adpa.data.cache.format import check_cache, prepare_cache
from adpa.data.cache.inventory import CacheFile, FileKind, list_files
from adpa.data.cache.locations import Location, check_writable, is_local
from adpa.data.cache.removal import as_restored, find_restorable, remove_files, remove_unless, restore
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.cache.samples import samples_folder
from adpa.data.cache.shards import (
    join_keys,
    list_shards,
    peek_keys,
    read_shard,
    serialize_replacement,
    write_serialized,
)
from adpa.data.cache.signals import Scoring, read_scorings
from adpa.errors import CacheError
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import CacheArgument, Group
from adpa.progress import progress

DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Garbage:
    """A file that no response set needs, or that has rows that none needs.

    Attributes:
        place: the file's place in the cache.
        kind: its kind.
        reason: why it can go.
        rows: rows that go; none for a file without rows.
        kept: rows that stay, in a new file.
        bytes: bytes that this frees; before the removal, an estimate that takes all rows to be of one size.
    """

    place: str
    kind: FileKind
    reason: str
    rows: int | None
    kept: int
    bytes: int


@dataclass(frozen=True)
class GarbageReport:
    """The result of ``collect_garbage``.

    Attributes:
        cache: the cache.
        garbage: the garbage.
        bytes: bytes that its removal frees.
        young: places of files that look like garbage, but stay because a run may still use them.
        repeated: places of files with garbage rows that stay because another file has some of their other rows, too.
            Without them readers could see the other copy of such a row. ``adpa cache pack`` drops the unused copy.
        done: whether the garbage was removed.
    """

    cache: str
    garbage: list[Garbage]
    bytes: int
    young: list[str]
    repeated: list[str]
    done: bool


@takes_options
def collect_garbage(
    cache: CacheArgument,
    yes: Annotated[bool, Doc("Remove what is listed."), Group.DECIDE] = False,
) -> GarbageReport:
    """List what no response set needs; --yes removes it.

    To drop a response set, remove its file in CACHE/responses and run this. Garbage is: signal rows that no set needs
    (a file with other rows is rewritten without them), scorings without rows, tokenizers that no set names, samples
    of which no set was made, pending rows that need no reference any more, temporary files of killed runs, and the
    files in CACHE/damaged. Temporary files, samples, tokenizers and scorings without rows stay for a day, because a
    run may still need them. With --yes the clock of the file system measures the day, else that of this machine. A
    file stays as it is while another file repeats some of its rows: run adpa cache pack first. In a file system, other
    commands may run at the same time. An object store cannot rename: adpa precompute and adpa cache merge must not run
    there at the same time.

    Raises:
        CacheError: the cache does not exist, or a response set was set aside and not made again.
        DamagedFileError: a file is damaged, so that needs are unknown.
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
    search = _Garbage(cache, needs, files, young)
    for scoring in read_scorings(cache):
        search.of_scoring(scoring)
    search.of_owners("samples", "no response set was made of them")
    search.of_owners("tokenizer", "no response set names it")
    search.others()
    garbage = [part for candidate in search.candidates for part in candidate.garbage]
    if yes:
        garbage = []
        with progress("removing: files", len(search.candidates)) as advance:
            for candidate in search.candidates:
                garbage += candidate.remove()
                advance(1)
    return GarbageReport(
        cache=str(cache),
        garbage=garbage,
        bytes=sum(part.bytes for part in garbage),
        young=sorted(search.young),
        repeated=sorted(search.repeated),
        done=yes,
    )


class _Needs:
    """The needs of the response sets; a set counts once it was seen, even if its file vanishes."""

    def __init__(self, cache: Location) -> None:
        self.sets: dict[str, ResponseSet] = {}
        self._cache = cache
        self._names: set[str] = set()
        self.look()

    def look(self) -> int:
        """Reads the sets if a new one has appeared; returns the number of sets ever seen."""
        names = {path.name for path in list_shards(self._cache / "responses")}
        if not names <= self._names:
            self.sets |= {responses.id: responses for responses in read_response_sets(self._cache)}
            self._names |= names
        return len(self.sets)

    def keys(self, vocabulary: str) -> pa.ChunkedArray:
        """The keys of the sets of a vocabulary."""
        tables = [responses.table for responses in self.sets.values() if responses.info.vocabulary == vocabulary]
        return join_keys(table["key"] for table in tables)

    def owners(self, kind: FileKind) -> set[str]:
        """The ids of the samples or tokenizers that the sets name."""
        infos = [responses.info for responses in self.sets.values()]
        if kind == "tokenizer":
            return {info.tokenizer for info in infos}
        return {samples_folder(self._cache, info.sampling).name for info in infos if info.sampling is not None}


@dataclass(frozen=True)
class _Candidate:
    """Probable garbage, and the function that removes it and returns the removed part."""

    garbage: list[Garbage]
    remove: Callable[[], list[Garbage]]


class _Garbage:
    """Collects garbage: whole files, and files with rows that stay."""

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
        """Rows that no set of the scoring's vocabulary has, pending rows that are done, a scoring without rows."""
        own = self._scorings[scoring.id]
        signals, pending = (_read_keys(own, kind) for kind in ("signals", "pending"))

        def needed(keys: pa.ChunkedArray) -> pa.ChunkedArray:
            return pc.is_in(keys, value_set=self._needs.keys(scoring.vocabulary))

        done = join_keys(signals.values())
        done = done.filter(needed(done))

        def still_pending(keys: pa.ChunkedArray) -> pa.ChunkedArray:
            return pc.and_not(needed(keys), pc.is_in(keys, value_set=done))

        stays = [
            *self._rows(signals, needed, "no response set needs it", _repeated(signals.values())),
            *self._rows(pending, still_pending, "done, or no response set needs it", _repeated([])),
        ]
        if own and not any(stays):  # a scoring that appeared after the listing has no files here
            left = [file for file in own if file.kind == "scoring"]
            folder = scoring.folder(self._cache)

            def has_rows() -> bool:
                return bool(list_shards(folder) or list_shards(folder / "pending"))

            self._unless_young(left, "it has no rows", max(file.changed for file in own), has_rows)

    def of_owners(self, kind: FileKind, reason: str) -> None:
        """Folders of a kind of files, except those that are needed."""
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
            if kind == "tokenizer" and is_local(self._cache):  # a local one goes as a whole
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
        keep: Callable[[pa.ChunkedArray], pa.ChunkedArray],
        reason: str,
        repeated: pa.Array,
    ) -> list[bool]:
        """Notes the rows of some files that ``keep`` does not keep; returns for each file whether it keeps any.

        A file that keeps one of the ``repeated`` keys stays as it is: file names decide which copy of a row is read.
        """
        masks, start = keep(join_keys(files.values())), 0
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
                remove = partial(self._remove_rows, file, garbage, mask, len(self._needs.sets), keep, repeated)
                self.candidates.append(_Candidate([garbage], remove))
        return stays

    def _remove_rows(
        self,
        file: CacheFile,
        garbage: Garbage,
        mask: pa.ChunkedArray,
        sets: int,
        keep: Callable[[pa.ChunkedArray], pa.ChunkedArray],
        repeated: pa.Array,
    ) -> list[Garbage]:
        """Removes the rows of a file that the first ``sets`` sets do not need, unless newer sets need them."""
        keys = _peek(file)
        if keys is None:
            return []
        now = self._needs.look()
        if now != sets:
            mask = keep(keys)
        kept, size = _count(mask), file.size
        if kept == len(keys) > 0 or _has_any(keys.filter(mask), repeated):
            return []
        if kept:
            try:
                rest = read_shard(file.path).filter(mask)  # this checks the digest: damage must not get a new one
            except FileNotFoundError:
                return []
            replacement = serialize_replacement(rest)
            write_serialized(file.path.parent, file.path.name.partition("-")[0], replacement)
            size -= replacement.size  # not of the file: a pack at the same time may have removed it
        dropped = keys.filter(pc.invert(mask))

        def needed() -> bool:
            return self._needs.look() != now and _count(keep(dropped)) > 0

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
        """Notes a file, or the files of a folder; calls ``needed`` again when it removes them."""
        garbage = [Garbage(file.place, file.kind, reason, None, 0, file.size) for file in files]

        def remove() -> list[Garbage]:
            if needed is None:
                remove_files(self._cache, files)
            elif needed() or not remove_unless(self._cache, path, needed):
                return []
            return garbage

        self.candidates.append(_Candidate(garbage, remove))


def _check_sets_are_whole(cache: Location, needs: _Needs) -> None:
    """Checks that every set that was set aside exists again: otherwise its needs are unknown."""
    present = {responses.shard_prefix() for responses in needs.sets.values()}
    for path in list_folder(cache / "damaged" / "responses"):
        if path.stem.rpartition("-")[0] not in present:
            raise CacheError(
                f"{path}: a response set that was set aside; without it its rows would be taken for garbage",
                "run the same adpa precompute first, or remove this file",
            )


def _read_keys(files: Iterable[CacheFile], kind: FileKind) -> dict[CacheFile, pa.ChunkedArray]:
    """The keys of each shard of a kind, copied, so that no file stays open."""
    columns = ((file, _peek(file)) for file in files if file.kind == kind)
    return {file: keys.take(np.arange(len(keys))) for file, keys in columns if keys is not None}


def _peek(file: CacheFile) -> pa.ChunkedArray | None:
    try:
        return peek_keys(file.path)
    except FileNotFoundError:  # a run that has just ended removed it
        return None


def _repeated(columns: Iterable[pa.ChunkedArray]) -> pa.Array:
    """The keys that more than one column has."""
    counted = join_keys(pa.chunked_array([pc.unique(column)]) for column in columns).value_counts()
    return counted.field("values").filter(pc.greater(counted.field("counts"), 1))


def _has_any(keys: pa.ChunkedArray, others: pa.Array) -> bool:
    return _count(pc.is_in(keys, value_set=others)) > 0


def _count(mask: pa.ChunkedArray) -> int:
    return pc.sum(mask).as_py() or 0


def _now(cache: Location) -> float:
    """The time by the clock of the file system, which may be on another machine."""
    path = cache / f".clock.{uuid.uuid4().hex}"
    path.write_bytes(b"")
    try:
        return path.stat().st_mtime
    finally:
        path.unlink()

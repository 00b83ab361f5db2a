"""Adds the files of another cache, by hard link where possible, else by copy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import pyarrow as pa
from typing_extensions import Doc

from adpa.data.cache import samples, signals
from adpa.data.cache.files import link_file, remove_file, write_file
from adpa.data.cache.format import check_cache, prepare_cache
from adpa.data.cache.inventory import CacheFile, list_files
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.responses import read_response_set
from adpa.data.cache.shards import (
    check_shard,
    keys_of,
    list_again,
    list_shards,
    peek_keys,
    read_shard,
    serialize,
    write_serialized,
)
from adpa.data.cache.signals import read_scoring_file, write_scoring
from adpa.data.cache.tokenizers import check_tokenizer, copy_tokenizer
from adpa.errors import DamagedFileError, OptionError
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import Group
from adpa.progress import progress


@dataclass
class Taken:
    """The number of files that were taken in one way, and their size."""

    files: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Counts a file."""
        self.files += 1
        self.bytes += size


@dataclass
class MergeReport:
    """The result of ``merge_cache``.

    Attributes:
        cache: the cache that was added to.
        other: the cache that was read.
        linked: files that both caches share now.
        copied: files that were copied, whole or in part: only rows that the cache lacked.
        present: files with nothing new: the cache already had them, or all of their rows.
        refused: a line about each damaged file of the other cache; nothing of it was taken.
        damaged: a line about each damaged file of the cache itself. It counts as missing: the other cache's rows are
            taken, and replace it if the names are equal.
        left_out: files that are not taken: pending rows, temporary and damaged files, and others.
    """

    cache: str
    other: str
    linked: Taken = field(default_factory=Taken)
    copied: Taken = field(default_factory=Taken)
    present: Taken = field(default_factory=Taken)
    refused: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    left_out: Taken = field(default_factory=Taken)

    @property
    def failure(self) -> str:
        """One line on the damaged files; empty without any."""
        parts = []
        if self.refused:
            parts.append(f"{self.other}: files that are damaged were not taken: {'; '.join(self.refused)}")
        if self.damaged:
            parts.append(
                f"{self.cache}: files of its own are damaged; what {self.other} has of them was taken: "
                f"{'; '.join(self.damaged)}; adpa cache verify --repair sets aside what is still there"
            )
        return "; ".join(parts)


@takes_options
def merge_cache(
    cache: Annotated[Location, Doc("Directory or URL of the teacher-signal cache that is added to."), Group.DECIDE],
    other: Annotated[
        Location, Doc("Directory or URL of the cache whose files are taken; it is not changed."), Group.DECIDE
    ],
) -> MergeReport:
    """Take another cache's sets, signals, samples and tokenizers.

    Files are linked if both caches are on one file system, else copied. If the cache has some rows of a file, only the
    missing rows are copied. The digest of each file is checked first. Existing files stay as they are, unless they are
    damaged. Damaged files are never taken: they are named, and the exit code is 1.

    Raises:
        CacheError: one of them is not a cache.
        OptionError: both are the same, or the first cannot be written.
    """
    check_cache(cache)
    check_cache(other)
    if cache.resolve() == other.resolve():
        raise OptionError(f"{other}: the same cache as {cache}", "name another one")
    check_writable("CACHE", cache)
    prepare_cache(cache)
    merge = _Merge(cache, other, MergeReport(str(cache), str(other)))
    for file in list_again(other, partial(_take_all, merge)):
        if file.kind == "marker":
            merge.report.present.add(file.size)
        if file.kind in ("pending", "unfinished", "damaged", "evaluation", "unknown"):
            merge.report.left_out.add(file.size)
    return merge.report


def _take_all(merge: "_Merge") -> list[CacheFile]:
    """Takes the files that were not taken yet; returns all files of the listing."""
    files = list_files(merge.other)
    with progress("merging: bytes", sum(file.size for file in files)) as advance:
        # Sets come first, so that a gc at the same time sees that the rest is needed; a scoring comes before its rows.
        for kind in ("response set", "tokenizer", "scoring", "signals", "samples"):
            for file in files:
                if file.kind == kind:
                    merge.take(file)
                    advance(file.size)
    return files


@dataclass
class _Merge:
    cache: Location
    other: Location
    report: MergeReport
    tokenizers: dict[str, Taken] = field(default_factory=dict)
    keys: dict[Location, set[bytes]] = field(default_factory=dict)
    damaged: set[Location] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def take(self, file: CacheFile) -> None:
        """Takes a file, unless it is damaged or was taken before.

        Raises:
            FileNotFoundError: it has vanished, or a file of the cache itself has.
        """
        if file.place in self.taken:
            return
        if file.kind in ("signals", "samples"):
            self._read_keys(file)
        take = {
            "tokenizer": self._tokenizer,
            "scoring": self._scoring,
            "signals": self._rows,
            "samples": self._rows,
            "response set": self._response_set,
        }[file.kind]
        try:
            take(file)
        except DamagedFileError as error:
            self.report.refused.append(str(error.args[0]))
        self.taken.add(file.place)

    def _tokenizer(self, file: CacheFile) -> None:
        """Takes the whole tokenizer with its first file; the other files count in the same way."""
        if file.owner not in self.tokenizers:
            self.tokenizers[file.owner] = Taken()  # stays if it is damaged: its files are refused together
            folder = self.cache / "tokenizers" / file.owner
            if folder.exists():
                self._is_whole(folder, lambda: check_tokenizer(self.cache, file.owner))
                self.tokenizers[file.owner] = self.report.present
            else:
                copy_tokenizer(self.other, self.cache, file.owner)
                self.tokenizers[file.owner] = self.report.copied
        self.tokenizers[file.owner].add(file.size)

    def _scoring(self, file: CacheFile) -> None:
        scoring = read_scoring_file(file.path)
        own = scoring.folder(self.cache) / file.path.name
        present = own.exists() and self._is_whole(own, lambda: read_scoring_file(own))
        if not present:
            remove_file(own)
        write_scoring(self.cache, scoring)
        (self.report.present if present else self.report.copied).add(file.size)

    def _rows(self, file: CacheFile) -> None:
        """Takes a file of signals or samples; if the cache has some of its keys, only the rows with other keys.

        Of two rows with one key, file names would decide which one is read.
        """
        target = self.cache / file.place
        folder = target.parent
        if file.kind == "signals" and not (folder / "scoring.json").exists():
            self.report.left_out.add(file.size)  # its description is damaged, or never existed
            return
        check_shard(file.path)
        table = read_shard(file.path)
        keys = keys_of(file.path, table).to_pylist()
        present = self.keys[folder]
        if present.issuperset(keys):
            self.report.present.add(file.size)
        elif present.isdisjoint(keys) or target in self.damaged:
            self._link_or_copy(file, target)
        else:
            new = table.filter(pa.array([key not in present for key in keys]))
            payload = serialize(new)
            write_serialized(folder, file.path.name.partition("-")[0], payload)
            self.report.copied.add(payload.size)
        present.update(keys)

    def _read_keys(self, file: CacheFile) -> None:
        """Reads the keys of the rows that the cache has in the folder of a file."""
        folder = (self.cache / file.place).parent
        if folder not in self.keys:
            prefix = signals.SHARD_PREFIX if file.kind == "signals" else samples.SHARD_PREFIX
            keys: set[bytes] = set()
            for path in list_shards(folder, prefix):
                if self._is_whole(path, partial(_check_rows, path)):
                    keys.update(peek_keys(path).to_pylist())
            self.keys[folder] = keys

    def _response_set(self, file: CacheFile) -> None:
        check_shard(file.path)
        responses = read_response_set(file.path)
        own = list_shards(self.cache / "responses", responses.shard_prefix())
        if [path for path in own if self._is_whole(path, partial(read_response_set, path))]:
            self.report.present.add(file.size)
        else:
            self._link_or_copy(file, self.cache / file.place)

    def _is_whole(self, path: Location, read: Callable[[], object]) -> bool:
        """Whether a file of the cache itself is undamaged; a damaged one goes into the report."""
        try:
            read()
        except DamagedFileError as error:
            if path not in self.damaged:
                self.damaged.add(path)
                self.report.damaged.append(str(error.args[0]))
            return False
        return True

    def _link_or_copy(self, file: CacheFile, target: Location) -> None:
        if target in self.damaged:
            remove_file(target)
        if link_file(file.path, target):
            self.report.linked.add(file.size)
        else:
            write_file(target, pa.py_buffer(file.path.read_bytes()))
            self.report.copied.add(file.size)


def _check_rows(path: Location) -> None:
    keys_of(path, read_shard(path))

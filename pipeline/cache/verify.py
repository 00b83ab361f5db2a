"""Checks everything that a cache says about itself: digests, names, formats, ranges, sums, lengths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from typing_extensions import Doc

from adpa.data.cache.format import MARKER, check_cache, has_files
from adpa.data.cache.integrity import (
    SignalRules,
    error_problems,
    response_set_problems,
    sample_problems,
    signal_problems,
)
from adpa.data.cache.inventory import CacheFile, find_kind, list_files
from adpa.data.cache.locations import Location, check_writable
from adpa.data.cache.ragged import list_row
from adpa.data.cache.removal import set_aside
from adpa.data.cache.responses import ResponseSet, read_response_set
from adpa.data.cache.samples import check_samples
from adpa.data.cache.shards import check_shard, list_again, read_shard
from adpa.data.cache.signals import Scoring, SignalTable, check_signals, read_scoring_file
from adpa.data.cache.tokenizers import check_tokenizer
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import DamagedFileError
from adpa.pipeline.option_checks import takes_options
from adpa.pipeline.options import CacheArgument, Group
from adpa.progress import progress

ROWS = ("response set", "signals", "pending", "samples")
UNCHECKED = ("unknown", "unfinished", "damaged", "evaluation")


@dataclass(frozen=True)
class Fault:
    """A problem of a file.

    Attributes:
        place: the file's place in the cache; for a tokenizer, that of its folder.
        problem: what is wrong.
        rows: the number of its rows with this problem; none if the problem is not one of rows.
    """

    place: str
    problem: str
    rows: int | None = None


@dataclass(frozen=True)
class VerifyReport:
    """The result of ``verify_cache``.

    Attributes:
        cache: the cache.
        files: files checked.
        bytes: their size.
        rows: rows decoded, of all kinds.
        faults: every problem.
        set_aside: the new places of damaged files.
        unknown: places of files that do not belong to a cache; they were not checked.
        unfinished: temporary files of running or killed processes; they were not checked.
        damaged: files that were set aside before.
    """

    cache: str
    files: int
    bytes: int
    rows: int
    faults: list[Fault]
    set_aside: list[str]
    unknown: list[str]
    unfinished: int
    damaged: int

    @property
    def failure(self) -> str:
        """One line on the faults; empty without any."""
        if not self.faults:
            return ""
        places = {fault.place for fault in self.faults}
        faults = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        summary = f"{self.cache}: {faults} in {', '.join(sorted(places))}"
        if self.set_aside:
            return f"{summary}; set aside under damaged/: run the same adpa precompute again to fill the gap"
        return f"{summary}; --repair sets damaged files aside"


@takes_options
def verify_cache(
    cache: CacheArgument,
    repair: Annotated[
        bool,
        Doc("Move damaged files to CACHE/damaged, so that the next adpa precompute makes them again."),
        Group.DECIDE,
    ] = False,
) -> VerifyReport:
    """Check every digest, every row and every file's name.

    Every row is decoded. Prompts and responses must have ids of the tokenizer's vocabulary. A teacher's top K may have
    further ids, as embedding matrices may be padded; they must be distinct. Log-probabilities must be at most 0 and
    fall. Mass and tail must sum to 1, within the precision of float16. Lengths must be those of the responses, and keys
    the digests of their ids. Advantages must exist exactly if the scoring has a reference. All faults are listed, and
    any fault makes the exit code 1. Files that do not belong to a cache are listed, but are no fault.

    Raises:
        CacheError: the cache does not exist, or has a file of a newer format.
        DamagedFileError: nothing but a ``cache.json`` that is damaged, or of another program, suggests a cache.
        OptionError: the cache cannot be written, with ``repair``.
    """
    marker = _check_marker(cache)
    if repair:
        check_writable("--repair:", cache)
    check = _Check(cache)
    check.faults += marker
    files = list_again(cache, check.new)
    checked = [*check.checked.values()]
    aside = []
    if repair:
        faulty = {fault.place for fault in check.faults}
        damaged = [file for file in checked if file.place in faulty or _folder(file) in faulty]
        aside = set_aside(cache, sorted(damaged, key=attrgetter("place")))
    return VerifyReport(
        cache=str(cache),
        files=len(checked),
        bytes=sum(file.size for file in checked),
        rows=check.rows,
        faults=check.faults,
        set_aside=aside,
        unknown=[file.place for file in files if file.kind == "unknown"],
        unfinished=sum(file.kind == "unfinished" for file in files),
        damaged=sum(file.kind == "damaged" for file in files),
    )


def _check_marker(cache: Location) -> list[Fault]:
    try:
        check_cache(cache)
    except DamagedFileError as error:
        if not has_files(cache):  # then it may not be a cache at all
            raise
        return [Fault(MARKER, _problem(error).removeprefix(f"{cache / MARKER}: "))]
    return []


class _Check:
    """Checks files, each after the files that it depends on; collects the faults and the checked files."""

    def __init__(self, cache: Location) -> None:
        self.rows = 0
        self.faults: list[Fault] = []
        self.checked: dict[str, CacheFile] = {}
        self._cache = cache
        self._files: list[CacheFile] = []
        # Of each undamaged tokenizer, by its digest; None for one that needs code, which does not run here.
        self._vocabularies: dict[str, _Vocabulary | None] = {}
        self._sets: list[ResponseSet] = []  # the sets without a fault
        self._described: dict[str, Scoring | None] = {}  # none if the description is damaged

    def new(self) -> list[CacheFile]:
        """Lists the cache and checks the files that were not checked yet; returns the listing.

        Raises:
            FileNotFoundError: a listed file has vanished.
        """
        files = list_files(self._cache)
        self._files = [file for file in files if file.kind not in UNCHECKED and file.place not in self.checked]
        with progress("verifying: bytes", sum(file.size for file in self._files)) as advance:
            self._advance = advance
            self._tokenizers()
            self._response_sets()
            self._scorings()
            self._samples()
            for file in self._of("marker"):
                self._done(file)
        self.faults += [
            Fault(place, "not a file or a link to one: remove it, or restore what it leads to")
            for file in files
            if file.kind == "unknown" and find_kind(place := file.place.removesuffix("/")) in ROWS
        ]
        return files

    def _tokenizers(self) -> None:
        for digest in sorted({file.owner for file in self._of("tokenizer")}):
            try:
                tokenizer = check_tokenizer(self._cache, digest)
            except DamagedFileError as error:
                self._note(f"tokenizers/{digest}", error)
            else:
                self._vocabularies[digest] = None
                if tokenizer is not None:
                    size = max(tokenizer.get_vocab().values()) + 1
                    self._vocabularies[digest] = _Vocabulary(digest_tokenizer(tokenizer).vocabulary, size)
            for file in self._of("tokenizer"):
                if file.owner == digest:
                    self._done(file)

    def _response_sets(self) -> None:
        for file in self._of("response set"):
            try:
                check_shard(file.path)
                responses = read_response_set(file.path)
            except DamagedFileError as error:
                self._note(file.place, error)
                self._done(file)
                continue
            self._done(file)
            self.rows += len(responses)
            info = responses.info
            vocabulary = self._vocabularies.get(info.tokenizer)
            problems = list(response_set_problems(responses, None if vocabulary is None else vocabulary.size))
            if vocabulary is not None and vocabulary.vocabulary != info.vocabulary:
                problems.append("its vocabulary is not its tokenizer's")
            self.faults += [Fault(file.place, problem) for problem in problems]
            missing = f"tokenizers/{info.tokenizer}"
            if info.tokenizer not in self._vocabularies and missing not in {fault.place for fault in self.faults}:
                self.faults.append(Fault(missing, f"missing, though {responses.shard_prefix()} names it"))
            if not problems:
                self._sets.append(responses)

    def _scorings(self) -> None:
        for file in self._of("scoring"):
            scoring = None
            try:
                scoring = read_scoring_file(file.path)
            except DamagedFileError as error:
                self._note(file.place, error)
            self._described[file.owner] = scoring
            self._done(file)
        responses = _Responses(self._sets)
        shards = [*self._of("signals"), *self._of("pending")]
        for owner in sorted({file.owner for file in shards}):
            own = [file for file in shards if file.owner == owner]
            if owner not in self._described:
                self._described[owner] = None
                problem = f"missing, so that nobody can read the {len(own)} files beside it"
                self.faults.append(Fault(f"scorings/{owner}/scoring.json", problem))
            for file in own:
                self._signals(file, self._described[owner], responses)
                self._done(file)

    def _signals(self, file: CacheFile, scoring: Scoring | None, responses: "_Responses") -> None:
        table = self._read(file)
        if table is None or scoring is None:
            return
        if file.kind == "pending":
            rules = SignalRules(scoring.top_k, with_reference=False)
        else:
            rules = SignalRules(scoring.top_k, scoring.reference is not None, scoring.top_p, scoring.lossy)
            try:
                check_signals(file.path, table, scoring)
                problems = error_problems(table) if scoring.lossy else []
                self.faults += [Fault(file.place, problem) for problem in problems]
            except DamagedFileError as error:
                self._note(file.place, error)
                return
        first: dict[str, str] = {}
        counts: dict[str, int] = {}
        number = 0
        try:
            signals = SignalTable([table])
            for number, ids in enumerate(responses.of(table["key"])):
                self.rows += 1
                row = signals.row(number)
                for problem in signal_problems(row, rules, ids):
                    kind = problem.partition(":")[0]
                    first.setdefault(kind, f"row {number}, key {row.key.hex()}: {problem}")
                    counts[kind] = counts.get(kind, 0) + 1
        except Exception as error:  # a decoder may raise anything for a damaged row
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.faults.append(Fault(file.place, f"row {number}: cannot be decoded: {reason}"))
        self.faults += [Fault(file.place, problem, counts[kind]) for kind, problem in first.items()]

    def _samples(self) -> None:
        for file in self._of("samples"):
            table = self._read(file)
            self._done(file)
            if table is None:
                continue
            try:
                check_samples(file.path, table)
            except DamagedFileError as error:
                self._note(file.place, error)
                continue
            self.rows += len(table)
            faulty = {
                row: problem
                for row in range(len(table))
                for problem in sample_problems(list_row(table["response_ids"], row))
            }
            if faulty:
                row, problem = next(iter(faulty.items()))
                self.faults.append(Fault(file.place, f"row {row}: {problem}", len(faulty)))

    def _read(self, file: CacheFile) -> pa.Table | None:
        try:
            check_shard(file.path)
            return read_shard(file.path)
        except (DamagedFileError, pa.ArrowInvalid) as error:
            self._note(file.place, error)
            return None

    def _of(self, kind: str) -> list[CacheFile]:
        return [file for file in self._files if file.kind == kind]

    def _done(self, file: CacheFile) -> None:
        self.checked[file.place] = file
        self._advance(file.size)

    def _note(self, place: str, error: Exception) -> None:
        self.faults.append(Fault(place, _problem(error)))


def _problem(error: Exception) -> str:
    problem = str(error.args[0]) if isinstance(error, DamagedFileError) else str(error)
    return " ".join(problem.rpartition(": damaged: ")[2].split())


@dataclass(frozen=True)
class _Vocabulary:
    vocabulary: str
    size: int


class _Responses:
    """The responses of the sets without a fault, by key."""

    def __init__(self, sets: Sequence[ResponseSet]) -> None:
        tables = [responses.table.select(["key", "response_ids"]).replace_schema_metadata() for responses in sets]
        self._table = pa.concat_tables(tables) if tables else None

    def of(self, keys: pa.ChunkedArray) -> Iterator[NDArray[np.int32] | None]:
        """The response of each key: int32 [T]; none if no set has the key."""
        if self._table is None:
            yield from [None] * len(keys)
            return
        for number in pc.index_in(keys, value_set=self._table["key"]).to_pylist():
            yield None if number is None else list_row(self._table["response_ids"], number)


def _folder(file: CacheFile) -> str:
    """The folder of a tokenizer's file; empty for other files. A tokenizer is damaged as a whole."""
    return f"tokenizers/{file.owner}" if file.kind == "tokenizer" else ""

"""Fills a cache, with a fault at any step: a killed process or an error of the operating system.

The run is real: format marker, tokenizer, samples, response sets, pending rows of the teacher, signal rows. Only the
models are stand-ins: functions of the token ids. Faults happen in the operating system's functions.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.data.makers import INFO, SAMPLING, TURN_END, token_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from adpa.data.cache.documents import read_document
from adpa.data.cache.format import find_version, prepare_cache
from adpa.data.cache.responses import make_response_set, read_response_sets, write_response_set
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples
from adpa.data.cache.shards import read_shard
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring, read_scorings, read_signals
from adpa.data.cache.tokenizers import read_tokenizer, write_tokenizer
from adpa.data.sequences import TokenIds
from adpa.data.vocabulary import digest_tokenizer
from adpa.errors import CacheError
from adpa.pipeline.scoring.sample import sample_responses
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs, missing_sequences, score

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, "a")), unk_token="a")
DIGEST = digest_tokenizer(TOKENIZER).tokenizer
SCORING = Scoring(ModelIdentity("teacher", None, "a"), ModelIdentity("reference", None, "b"), "v", 3, "float32", "hf")
REQUESTS = [SampleRequest(token_ids(5, number), 0) for number in range(3)]
SAMPLING_BATCH, SCORING_BATCH = 36, 15  # tokens: two batches each


class Model:
    """A scorer and sampler whose numbers depend on the token ids alone."""

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        for batch in batches:
            yield [
                SignalRow(
                    sequence.key,
                    -sequence.response_ids.astype(np.float32),
                    np.tile(np.arange(top_k, dtype=np.int32), (len(sequence.response_ids), 1)),
                    np.outer(-1 - sequence.response_ids, np.arange(1, top_k + 1)).astype(np.float32),
                    np.full(len(sequence.response_ids), -3.0, np.float32),
                )
                for sequence in batch
            ]

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        for given in topk_ids:
            yield [(np.full(len(ids), -2.0, np.float32), np.full(ids.shape, -2.0, np.float32)) for ids in given]

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        for batch in batches:
            yield [np.append(request.prompt_ids[::-1], np.int32(TURN_END)) for request in batch]

    def close(self) -> None:
        pass


def fill(cache: Path) -> None:
    """Fills a cache as ``precompute`` does."""
    prepare_cache(cache)
    sample_responses(cache, SAMPLING, missing_requests(read_samples(cache, SAMPLING), REQUESTS), Model, SAMPLING_BATCH)
    said = read_samples(cache, SAMPLING)
    write_tokenizer(cache, TOKENIZER, DIGEST)
    examples = [(str(number), request.prompt_ids) for number, request in enumerate(REQUESTS)]
    sets = [
        make_response_set(INFO, [(example, prompt, token_ids(7, TURN_END)) for example, prompt in examples]),
        make_response_set(
            replace(INFO, name="sampled", sampling=SAMPLING),
            [(example, prompt, said[SampleRequest(prompt, 0).key]) for example, prompt in examples],
        ),
    ]
    for responses in sets:
        write_response_set(cache, responses)
    sequences = [sequence for responses in sets for sequence in responses.sequences()]
    score(cache, SCORING, missing_sequences(cache, SCORING, sequences), lambda _: Model(), SCORING_BATCH)


def contents(cache: Path) -> dict[str, dict[Any, Any]]:
    """Every row of a cache, as its readers return it."""
    found: dict[str, dict[Any, Any]] = {"version": {find_version(cache): True}}
    found["samples"] = {key: ids.tolist() for key, ids in read_samples(cache, SAMPLING).items()}
    found["sets"] = {responses.id: responses.table.to_pylist() for responses in read_response_sets(cache)}
    for scoring in read_scorings(cache):
        signals = read_signals(cache, scoring)
        rows = [signals.row(number) for number in range(len(signals))]
        found[scoring.id] = {
            row.key: [np.asarray(value).tolist() for name, value in vars(row).items() if name != "key"] for row in rows
        }
    return found


def check_wreck(cache: Path, whole: dict[str, dict[Any, Any]]) -> None:
    """Checks that no file with a final name is partial, and that readers see only rows of the whole cache."""
    for path in cache.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(cache).parts):
            continue
        if path.suffix == ".arrow":
            read_shard(path)
        elif path.name in ("cache.json", "scoring.json", "files.json"):
            assert read_document(path)[1], path
    if (cache / "tokenizers" / DIGEST).exists():
        read_tokenizer(cache, DIGEST)
    for name, rows in contents(cache).items():
        assert rows.items() <= (whole[name] | {None: True, 1: True}).items()


CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink")


@dataclass(frozen=True)
class Point:
    """A moment of a run: before or after a call, or in the middle of a write."""

    call: str
    moment: str


class Watched:
    """Announces every call of the operating system that changes a cache."""

    def __init__(self, cache: Path, reach: Callable[[Point], None], committed: Callable[[str], None]) -> None:
        self.cache, self.reach, self.committed = str(cache), reach, committed
        self.real = {name: getattr(os, name) for name in (*CALLS, "close")}
        self.descriptors: set[int] = set()

    def __enter__(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watch(name))
        setattr(os, "close", self._close)  # noqa: B010  # its type names the parameter

    def __exit__(self, *_: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def _close(self, descriptor: int) -> None:
        self.descriptors.discard(descriptor)
        self.real["close"](descriptor)

    def _watch(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            ours = target in self.descriptors if isinstance(target, int) else str(target).startswith(self.cache)
            if not ours or (name == "open" and not arguments[0] & os.O_CREAT):
                result = real(target, *arguments, **options)
                if ours and name == "open":  # a directory, opened to be synced
                    self.descriptors.add(result)
                return result
            self.reach(Point(name, "before"))
            if name == "write":
                done = real(target, arguments[0][: len(arguments[0]) // 2])
                self.reach(Point(name, "half"))
                result = done + real(target, arguments[0][done:])
            else:
                result = real(target, *arguments, **options)
            if name == "open":
                self.descriptors.add(result)
            if name in ("rename", "unlink"):
                self.committed(f"{name} {arguments[0] if arguments else target}\n")
            self.reach(Point(name, "after"))
            return result

        return call


def points_of(cache: Path) -> list[Point]:
    """The moments of a run without faults."""
    points: list[Point] = []
    with Watched(cache, points.append, lambda _: None):
        fill(cache)
    return points


def fill_until(cache: Path, at: int, fault: Callable[[], None], committed: Callable[[str], None]) -> None:
    """Fills a cache, with a fault at moment ``at``."""
    reached = iter(range(10**9))

    def reach(_: Point) -> None:
        if next(reached) == at:
            fault()

    with Watched(cache, reach, committed):
        fill(cache)


def fill_and_kill(cache: Path, at: int) -> list[str]:
    """Fills a cache in a process that is killed at moment ``at``. Returns the renames and unlinks before it."""
    read, write = os.pipe()
    process, real_write = os.fork(), os.write
    if process == 0:
        try:
            fill_until(
                cache,
                at,
                lambda: os.kill(os.getpid(), signal.SIGKILL),
                lambda line: [real_write(write, line.encode())].clear(),
            )
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as file:
        committed = file.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    return committed


def fill_and_fail(cache: Path, at: int, number: int) -> list[str]:
    """Fills a cache until a call raises an error. Returns the renames and unlinks before it."""
    committed: list[str] = []

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises((OSError, CacheError), match=os.strerror(number)):
        fill_until(cache, at, fail, committed.append)
    return [line.strip() for line in committed]

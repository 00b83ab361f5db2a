"""Samples the student's own responses ŷ and writes them into the cache, batch by batch. A killed run can be resumed."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import (
    SHARD_PREFIX,
    SampleRequest,
    missing_requests,
    read_samples,
    samples_folder,
    write_samples,
)
from adpa.data.sequences import TokenIds
from adpa.errors import CacheError
from adpa.pipeline.scoring.jobs import Executor, make_batches, run_here
from adpa.pipeline.scoring.other_runs import Alarm, Watch, Written
from adpa.pipeline.scoring.score import Scorer


class Sampler(Protocol):
    """A model that samples responses, batch after batch, in order."""

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """A response to each request, int32 [T]: up to the first of the sampling's ends, or ``max_new_tokens``."""
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...


class SharedSampler(ABC):
    """A ``Sampler`` whose loaded model can do more, so that nobody has to load it again."""

    _sampling: Sampling

    @abstractmethod
    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """See ``Sampler.sample``."""

    @abstractmethod
    def close(self) -> None:
        """See ``Sampler.close``."""

    def with_sampling(self, sampling: Sampling) -> Self:
        """A sampler of the same loaded model with other settings of the same dtype."""
        other = copy(self)
        other._sampling = sampling
        return other

    def as_scorer(self) -> Scorer | None:
        """The same loaded model as a scorer; None if the engine loads it in another way to score."""
        return None


@dataclass(frozen=True)
class SamplingJob:
    """A ``Job`` that samples the student's responses into the cache."""

    cache: Location
    sampling: Sampling
    open_sampler: Callable[[], Sampler]
    alarm: Callable[[], None]

    counts = "sampling: responses"

    def size(self, request: SampleRequest) -> int:
        """One response."""
        return 1

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Sequence[SampleRequest]]], Iterator[Callable[[], Written]]]]:
        """See ``Job.open``."""
        watch = Watch([(samples_folder(self.cache, self.sampling), SHARD_PREFIX)], self.alarm)
        with closing(self.open_sampler()) as sampler:
            yield lambda batches: watch.over(batches, self._sample(sampler, batches))

    def _sample(self, sampler: Sampler, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[Callable[[], Written]]:
        for batch, responses in zip(batches, sampler.sample(batches), strict=True):
            yield partial(self._write, batch, responses)

    def _write(self, batch: Sequence[SampleRequest], responses: Sequence[TokenIds]) -> Written:
        path = write_samples(self.cache, self.sampling, batch, responses)
        return Written(path.name, [request.key for request in batch])


def sample_responses(
    cache: Location,
    sampling: Sampling,
    requests: Sequence[SampleRequest],
    open_sampler: Callable[[], Sampler],
    batch_tokens: int,
    run: Executor = run_here,
    alarm: Alarm | None = None,
) -> None:
    """Samples a response to each request and adds it to the cache, batch by batch.

    Args:
        cache: the cache's directory.
        sampling: how to sample.
        requests: the result of ``missing_requests``.
        open_sampler: loads the student.
        batch_tokens: tokens of a batch: prompts and the longest possible responses together.
        run: runs the student.
        alarm: warns if another process samples the same.
    """
    if not requests:
        return
    doubled = partial(alarm or Alarm(), cache, "samples the same responses")
    job = SamplingJob(cache, sampling, open_sampler, doubled)
    written = run(job, sampling_batches(requests, sampling.max_new_tokens, batch_tokens))
    if any(one.doubled for one in written):
        doubled()


def complete_samples(
    cache: Location,
    sampling: Sampling,
    samples: Sequence[SampleRequest],
    missing: Sequence[SampleRequest],
    open_sampler: Callable[[], Sampler],
    batch_tokens: int,
    run: Executor = run_here,
    alarm: Alarm | None = None,
) -> dict[bytes, TokenIds]:
    """Samples the missing ones of a run's samples; gives the responses to all of them, and those of other runs.

    Args:
        cache: the cache's directory.
        sampling: how to sample.
        samples: all samples of the run.
        missing: those without a response yet.
        open_sampler: loads the student.
        batch_tokens: see ``sample_responses``.
        run: runs the student.
        alarm: warns if another process samples the same.

    Raises:
        CacheError: samples that were made are gone.
    """
    sample_responses(cache, sampling, missing, open_sampler, batch_tokens, run, alarm)
    answers = read_samples(cache, sampling)
    lost = missing_requests(answers, samples)
    if lost:  # samples of no set are garbage after a day: a gc beside this run may have removed some just now
        sample_responses(cache, sampling, lost, open_sampler, batch_tokens, run, alarm)
        answers |= read_samples(cache, sampling)
        lost = missing_requests(answers, samples)
    if lost:
        raise CacheError(f"{cache}: {len(lost)} samples that this run made are gone", "see what removes files there")
    return answers


def sampling_batches(
    requests: Sequence[SampleRequest], max_new_tokens: int, batch_tokens: int
) -> list[list[SampleRequest]]:
    """Batches that leave room for the longest possible responses."""
    return make_batches(requests, lambda request: len(request.prompt_ids) + max_new_tokens, batch_tokens)


def stream_seed(sampling: Sampling, request: SampleRequest, size: int) -> int:
    """The seed, ``size`` bytes, of one response's random numbers. It does not depend on other responses."""
    stream = hashlib.blake2b(sampling.seed.to_bytes(8, "little", signed=True) + request.key, digest_size=size)
    return int.from_bytes(stream.digest(), "little")

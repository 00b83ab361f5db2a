"""The student's own responses ŷ: which are missing, and sampling them in batches that survive a crash."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest, write_samples
from adpa.data.sequences import TokenIds
from adpa.pipeline.scoring.jobs import Executor, make_batches, run_here


class Sampler(Protocol):
    """A model that answers prompts, batch after batch, in order."""

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """A response to each request: int32 [T], with the end-of-turn token unless ``max_new_tokens`` cut it off."""
        ...

    def close(self) -> None:
        """Gives the model's memory back."""
        ...


@dataclass(frozen=True)
class SamplingJob:
    """A ``Job``: the student's responses, into the cache."""

    cache: Location
    sampling: Sampling
    open_sampler: Callable[[], Sampler]

    counts = "sampling: responses"

    def size(self, request: SampleRequest) -> int:
        """One response."""
        return 1

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Sequence[SampleRequest]]], Iterator[Callable[[], None]]]]:
        """See ``Job.open``."""
        with closing(self.open_sampler()) as sampler:
            yield partial(self._ask, sampler)

    def _ask(self, sampler: Sampler, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[Callable[[], None]]:
        for batch, responses in zip(batches, sampler.sample(batches), strict=True):
            yield partial(write_samples, self.cache, self.sampling, batch, responses)


def sample_responses(
    cache: Location,
    sampling: Sampling,
    requests: Sequence[SampleRequest],
    open_sampler: Callable[[], Sampler],
    batch_tokens: int,
    run: Executor = run_here,
) -> None:
    """Samples a response to each request and adds it to the cache, batch by batch, so that a killed run goes on.

    Args:
        cache: the cache's directory.
        sampling: how to sample.
        requests: what ``missing_requests`` gave.
        open_sampler: loads the student.
        batch_tokens: tokens of a batch, prompts and the longest possible responses together.
        run: where the student is asked.
    """
    if requests:
        run(
            SamplingJob(cache, sampling, open_sampler),
            sampling_batches(requests, sampling.max_new_tokens, batch_tokens),
        )


def sampling_batches(
    requests: Sequence[SampleRequest], max_new_tokens: int, batch_tokens: int
) -> list[list[SampleRequest]]:
    """Batches with room for the prompts and the longest possible responses."""
    return make_batches(requests, lambda request: len(request.prompt_ids) + max_new_tokens, batch_tokens)


def stream_seed(sampling: Sampling, request: SampleRequest, size: int) -> int:
    """The seed of a response's own random numbers, of so many bytes: it does not depend on what is sampled beside."""
    stream = hashlib.blake2b(sampling.seed.to_bytes(8, "little", signed=True) + request.key, digest_size=size)
    return int.from_bytes(stream.digest(), "little")

"""The student's own responses ŷ: which are missing, and sampling them in batches that survive a crash."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Protocol

from adpa.data.encoding import TokenIds
from adpa.data.locations import Location
from adpa.data.responses import Sampling
from adpa.data.samples import SampleRequest, write_samples
from adpa.pipeline.batching import make_batches, write_batches


class Sampler(Protocol):
    """A model that answers prompts, batch after batch, in order."""

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        """A response to each request: int32 [T], with the end-of-turn token unless ``max_new_tokens`` cut it off."""
        ...

    def close(self) -> None:
        """Gives the model's memory back."""
        ...


def sample_responses(
    cache: Location,
    sampling: Sampling,
    requests: Sequence[SampleRequest],
    open_sampler: Callable[[], Sampler],
    batch_tokens: int,
) -> None:
    """Samples a response to each request and adds it to the cache, batch by batch, so that a killed run goes on.

    Args:
        cache: the cache's directory.
        sampling: how to sample.
        requests: what ``missing_requests`` gave.
        open_sampler: loads the student.
        batch_tokens: tokens of a batch, prompts and the longest possible responses together.
    """
    if not requests:
        return

    def length(request: SampleRequest) -> int:
        return len(request.prompt_ids) + sampling.max_new_tokens

    batches = make_batches(requests, length, batch_tokens)
    with closing(open_sampler()) as sampler:
        answers = zip(batches, sampler.sample(batches), strict=True)

        def write(answer: tuple[Sequence[SampleRequest], list[TokenIds]]) -> None:
            write_samples(cache, sampling, *answer)

        write_batches("sampling: responses", batches, lambda _: 1, answers, write)


def stream_seed(sampling: Sampling, request: SampleRequest, size: int) -> int:
    """The seed of a response's own random numbers, of so many bytes: it does not depend on what is sampled beside."""
    stream = hashlib.blake2b(sampling.seed.to_bytes(8, "little", signed=True) + request.key, digest_size=size)
    return int.from_bytes(stream.digest(), "little")

"""The sampling loop: it samples only missing responses, batch by batch, and finished batches survive a failure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel
from tests.pipeline.conftest import SAMPLING

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest, missing_requests, read_samples
from adpa.data.sequences import TokenIds
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.sample import Sampler, sample_responses, stream_seed


def requests(count: int) -> list[SampleRequest]:
    generator = np.random.default_rng(1)
    return [
        SampleRequest(generator.integers(3, 24, generator.integers(1, 5)).astype(np.int32), 0) for _ in range(count)
    ]


class Echo:
    """A sampler that returns the prompt, records its requests, and fails on demand."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.fail_after = fail_after
        self.asked: list[Sequence[SampleRequest]] = []
        self.closed = 0

    def sample(self, batches: Sequence[Sequence[SampleRequest]]) -> Iterator[list[TokenIds]]:
        for batch in batches:
            if len(self.asked) == self.fail_after:
                raise KeyboardInterrupt
            self.asked.append(batch)
            yield [request.prompt_ids for request in batch]

    def close(self) -> None:
        self.closed += 1


def test_only_missing_responses_are_sampled_and_more_of_them_keep_the_first(
    make_model: MakeModel, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(make_model(20, layers=1, vocab_size=24, initializer_range=0.1)))

    def opening(sampling: Sampling) -> Callable[[], Sampler]:
        return lambda: HfSampler(checkpoint, sampling, torch.device("cpu"))

    wanted = [SampleRequest(request.prompt_ids, index) for request in requests(6) for index in (0, 1)]
    first = [request for request in wanted if request.index == 0]
    sample_responses(tmp_path, SAMPLING, missing_requests({}, first), opening(SAMPLING), 64)
    before = read_samples(tmp_path, SAMPLING)
    more = replace(SAMPLING, samples_per_prompt=2)
    missing = missing_requests(read_samples(tmp_path, more), wanted)
    assert {request.key for request in missing} == {request.key for request in wanted if request.index == 1}
    sample_responses(tmp_path, more, missing, opening(more), 64)
    after = read_samples(tmp_path, more)
    assert missing_requests(read_samples(tmp_path, more), wanted) == []
    assert {key: after[key].tolist() for key in before} == {key: before[key].tolist() for key in before}
    assert len(missing_requests(read_samples(tmp_path, replace(SAMPLING, seed=5)), first)) == len(
        {r.key for r in first}
    )


def test_every_request_gets_its_own_answer(tmp_path: Path) -> None:
    wanted = requests(9)
    sample_responses(tmp_path, SAMPLING, wanted, Echo, batch_tokens=40)
    said = read_samples(tmp_path, SAMPLING)
    assert all(said[request.key].tolist() == request.prompt_ids.tolist() for request in wanted)


def test_a_batch_has_room_for_prompts_and_the_longest_responses(tmp_path: Path) -> None:
    echo = Echo()
    wanted = [SampleRequest(np.array([5] * 4, dtype=np.int32), index) for index in range(7)]
    sample_responses(tmp_path, SAMPLING, wanted, lambda: echo, batch_tokens=3 * (4 + 12) + 1)
    assert [len(batch) for batch in echo.asked] == [3, 3, 1]


def test_an_interrupted_run_keeps_its_batches_and_closes_the_student(tmp_path: Path) -> None:
    wanted = [SampleRequest(np.array([5], dtype=np.int32), index) for index in range(6)]
    interrupted, last = Echo(fail_after=4), Echo()
    with pytest.raises(KeyboardInterrupt):
        sample_responses(tmp_path, SAMPLING, wanted, lambda: interrupted, batch_tokens=1)
    missing = missing_requests(read_samples(tmp_path, SAMPLING), wanted)
    assert [request.index for request in missing] == [4, 5]
    sample_responses(tmp_path, SAMPLING, missing, lambda: last, batch_tokens=1)
    assert missing_requests(read_samples(tmp_path, SAMPLING), wanted) == []
    assert (interrupted.closed, last.closed) == (1, 1)


def test_a_student_with_nothing_to_say_is_not_loaded(tmp_path: Path) -> None:
    sample_responses(tmp_path, SAMPLING, [], lambda: pytest.fail("loaded"), batch_tokens=64)


def test_a_stream_has_its_own_seed_for_each_seed_prompt_and_index() -> None:
    prompts = [np.array(ids, dtype=np.int32) for ids in ([5], [5, 6], [6, 5])]
    seeds = [
        stream_seed(replace(SAMPLING, seed=seed), SampleRequest(prompt, index), size=7)
        for seed in (-1, 0, 1)
        for prompt in prompts
        for index in range(3)
    ]
    assert len(set(seeds)) == 27
    assert all(0 <= seed < 2**56 for seed in seeds)


def test_the_settings_of_the_sampling_do_not_change_a_stream() -> None:
    (request,) = requests(1)
    other = replace(SAMPLING, temperature=0.5, max_new_tokens=100, samples_per_prompt=4)
    assert stream_seed(other, request, size=16) == stream_seed(SAMPLING, request, size=16)

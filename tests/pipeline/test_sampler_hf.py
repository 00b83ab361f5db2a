"""Sampling with transformers: reproducible from the seed whatever the batch, and truly the student's distribution."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel
from tests.pipeline.conftest import SAMPLING, assert_drawn_from
from transformers import AutoModelForCausalLM, PreTrainedModel

from adpa.data.samples import SampleRequest
from adpa.errors import ModelError
from adpa.pipeline.checkpoint import open_checkpoint
from adpa.pipeline.sampler_hf import HfSampler, sample

END = SAMPLING.turn_end


@pytest.fixture(scope="module")
def student(make_model: MakeModel) -> Path:
    return make_model(20, layers=1, vocab_size=24, initializer_range=0.1)


@pytest.fixture(scope="module")
def model(student: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(student).eval()
    return loaded


def requests(count: int, length: int = 4) -> list[SampleRequest]:
    generator = np.random.default_rng(1)
    return [
        SampleRequest(generator.integers(3, 24, generator.integers(1, length + 1)).astype(np.int32), 0)
        for _ in range(count)
    ]


def as_lists(responses: list[np.ndarray]) -> list[list[int]]:
    return [response.tolist() for response in responses]


def test_a_response_does_not_depend_on_its_batch(model: PreTrainedModel) -> None:
    wanted = requests(30, length=20)
    together = as_lists(sample(model, SAMPLING, wanted))
    alone = [sample(model, SAMPLING, [request])[0].tolist() for request in wanted]
    backwards = as_lists(sample(model, SAMPLING, wanted[::-1]))[::-1]
    assert together == alone == backwards


def test_seed_prompt_and_index_each_give_another_response(model: PreTrainedModel) -> None:
    prompt = np.array([5, 6], dtype=np.int32)
    first = as_lists(sample(model, SAMPLING, [SampleRequest(prompt, index) for index in range(8)]))
    other_seed = as_lists(sample(model, replace(SAMPLING, seed=1), [SampleRequest(prompt, i) for i in range(8)]))
    assert len({tuple(response) for response in first}) >= 6, "two of them may end at once"
    assert sum(one == two for one, two in zip(first, other_seed, strict=True)) <= 1


def test_a_response_stops_at_the_end_of_turn_token_or_at_the_limit(model: PreTrainedModel) -> None:
    responses = sample(model, SAMPLING, requests(60))
    ended = [response for response in responses if response[-1] == END]
    assert 0 < len(ended) < 60
    assert all((response[:-1] != END).all() for response in ended)
    assert all(len(response) == 12 for response in responses if response[-1] != END)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_follow_the_students_distribution(model: PreTrainedModel, temperature: float, top_p: float) -> None:
    settings = replace(SAMPLING, max_new_tokens=1, temperature=temperature, top_p=top_p)
    prompt, draws = np.array([7, 3], dtype=np.int32), 4000
    drawn = np.concatenate(sample(model, settings, [SampleRequest(prompt, index) for index in range(draws)]))
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(prompt).long()[None]).logits[0, -1].double()
    assert_drawn_from(drawn, logits, settings)


def test_temperature_zero_is_greedy_and_ignores_the_checkpoints_own_generation_settings(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    wanted = requests(10)
    expected = []
    for request in wanted:
        tokens = request.prompt_ids.tolist()
        while len(tokens) - len(request.prompt_ids) < 12 and (
            tokens[-1] != END or tokens == request.prompt_ids.tolist()
        ):
            with torch.inference_mode():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(request.prompt_ids) :])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert as_lists(sample(model, replace(SAMPLING, temperature=0.0), wanted)) == expected


def test_logits_that_are_not_finite_are_refused(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    for temperature in (1.0, 0.0):
        with pytest.raises(ModelError, match="not finite"):
            sample(model, replace(SAMPLING, temperature=temperature), requests(2))


def test_the_sampler_answers_batch_after_batch(student: Path, model: PreTrainedModel) -> None:
    wanted = requests(7)
    sampler = HfSampler(open_checkpoint(str(student)), SAMPLING, torch.device("cpu"))
    answers = list(sampler.sample([wanted[:3], wanted[3:]]))
    assert [len(answered) for answered in answers] == [3, 4]
    assert as_lists([*answers[0], *answers[1]]) == as_lists(sample(model, SAMPLING, wanted))

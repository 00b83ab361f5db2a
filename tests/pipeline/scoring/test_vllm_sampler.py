"""Sampling with a real vLLM on the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel
from tests.pipeline.conftest import assert_drawn_from, say_in_order

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.options import HeadDtype
from adpa.pipeline.scoring.engine import HfEngine
from adpa.pipeline.scoring.sample import Sampler
from adpa.pipeline.scoring.vllm_engine import VllmEngine, open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
QUICK = ("enforce_eager=true", "kv_cache_memory_bytes=67108864")
HF = HfEngine(CPU, "")
TEXT = (Path(__file__).parents[3] / "LICENSE").read_text()


def vllm_engine(checkpoint: Checkpoint, head_dtype: HeadDtype = "auto", *arguments: str) -> VllmEngine:
    options = VllmOptions(head_dtype=head_dtype, engine_arg=(*QUICK, *arguments))
    return open_vllm(options, CPU, {"teacher": checkpoint}, {"teacher": "float32"}, "")


END = 2
SAMPLING = Sampling("s", END, 1.0, 1.0, 12, 1, 0, "float32", "vllm")


@pytest.fixture(scope="module")
def student(make_model: MakeModel) -> Checkpoint:
    return open_checkpoint(str(make_model(62, width=128, layers=1, vocab_size=24, initializer_range=0.1)))


def requests(count: int, prompts: int = 10) -> list[SampleRequest]:
    """``count`` requests for each of some prompts."""
    generator = np.random.default_rng(1)
    drawn = [generator.integers(3, 24, generator.integers(1, 20)).astype(np.int32) for _ in range(prompts)]
    return [SampleRequest(prompt, index) for prompt in drawn for index in range(count)]


def sample(student: Checkpoint, sampling: Sampling, *batches: list[SampleRequest]) -> list[list[int]]:
    sampler: Sampler = vllm_engine(student).open_sampler(student, sampling, 64)
    responses = [response.tolist() for answered in sampler.sample(batches) for response in answered]
    sampler.close()
    return responses


def test_a_response_depends_on_seed_prompt_and_index_and_not_on_its_batch(student: Checkpoint) -> None:
    wanted = requests(3)
    together = sample(student, SAMPLING, wanted)
    assert sample(student, SAMPLING, wanted[:7], wanted[7:8], wanted[8:]) == together
    assert sample(student, SAMPLING, wanted[::-1])[::-1] == together
    other_seed = sample(student, replace(SAMPLING, seed=1), wanted)
    assert sum(one == two for one, two in zip(together, other_seed, strict=True)) <= 3
    assert len({tuple(response) for response in together[:3]}) > 1, "several of one prompt differ"


def test_more_prompts_than_a_step_of_the_engine_takes(student: Checkpoint) -> None:
    generator = np.random.default_rng(2)
    wanted = [SampleRequest(generator.integers(3, 24, 50).astype(np.int32), 0) for _ in range(120)]
    together = sample(student, SAMPLING, wanted)  # 6,000 tokens
    assert sample(student, SAMPLING, wanted[:10]) == together[:10]


def test_a_response_stops_at_the_end_of_turn_token_or_at_the_limit(student: Checkpoint) -> None:
    responses = sample(student, SAMPLING, requests(6))
    ended = [response for response in responses if response[-1] == END]
    assert 0 < len(ended) < len(responses)
    assert all(END not in response[:-1] for response in responses)
    assert all(len(response) == 12 for response in responses if response[-1] != END)


@pytest.mark.parametrize(
    ("stops", "response"), [((), [6, 9, 7, END]), ((7, 9), [6, 9]), ((7, 23), [6, 9, 7]), ((6,), [6])]
)
def test_a_response_ends_at_the_first_of_several_ends(
    stops: tuple[int, ...], response: list[int], make_model: MakeModel
) -> None:
    student = open_checkpoint(str(make_model(63, width=128, layers=1, vocab_size=24, tie_word_embeddings=False)))
    say_in_order(student, {5: 6, 6: 9, 9: 7, 7: END, END: 11, 11: 11})
    wanted = [SampleRequest(np.array(ids, dtype=np.int32), 0) for ids in ([5], [3, 4, 8, 5], [9, 5], [11])]
    assert sample(student, replace(SAMPLING, stops=stops), wanted) == [response] * 3 + [[11] * 12]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_tokens_follow_the_students_distribution(student: Checkpoint, temperature: float, top_p: float) -> None:
    settings = replace(SAMPLING, max_new_tokens=1, temperature=temperature, top_p=top_p)
    prompt, draws = np.array([7, 3], dtype=np.int32), 2000
    drawn = np.concatenate(sample(student, settings, [SampleRequest(prompt, index) for index in range(draws)]))
    with torch.inference_mode():
        logits = student.load("float32", CPU)(input_ids=torch.from_numpy(prompt).long()[None]).logits[0, -1].double()
    assert_drawn_from(drawn, logits, settings)


def test_greedy_responses_are_those_of_transformers(student: Checkpoint) -> None:
    greedy, wanted = replace(SAMPLING, temperature=0.0), requests(1)
    (expected,) = HF.open_sampler(student, greedy, 64).sample([wanted])
    assert sample(student, greedy, wanted) == [response.tolist() for response in expected]

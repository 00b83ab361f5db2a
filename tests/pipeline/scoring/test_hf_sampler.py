"""Sampling with transformers: reproducible from the seed in any batch, from the student's exact distribution, and
without a wait for the device at every token."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel
from tests.pipeline.conftest import SAMPLING, SMALL, assert_drawn_from, say_in_order
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, PreTrainedModel

from adpa.data.cache.responses import Sampling
from adpa.data.cache.samples import SampleRequest
from adpa.data.sequences import TokenIds
from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.scoring.hf_sampler import HfSampler, _uniforms, avoid_mask_sync, cut_after, draw, sample

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


def test_too_little_memory_in_the_trial_is_no_fault_of_the_model(
    student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("adpa.pipeline.scoring.hf_sampler.generate", generate)
    with pytest.raises(torch.OutOfMemoryError):
        HfSampler(open_checkpoint(str(student)), SAMPLING, torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("stops", "response"),
    [((), [6, 9, 7, END]), ((9,), [6, 9]), ((7, 9), [6, 9]), ((7, 23), [6, 9, 7]), ((6,), [6]), ((5,), [6, 9, 7, END])],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_response_ends_at_the_first_of_several_ends(
    stops: tuple[int, ...], response: list[int], temperature: float, make_model: MakeModel
) -> None:
    checkpoint = open_checkpoint(str(make_model(21, layers=1, vocab_size=24, tie_word_embeddings=False)))
    say_in_order(checkpoint, {5: 6, 6: 9, 9: 7, 7: END, END: 11, 11: 11})
    prompts = ([5], [3, 4, 8, 5], [9, 5], [6, 9, 7, END, 3, 5], [11])  # the last one never ends
    wanted = [SampleRequest(np.array(prompt, dtype=np.int32), 0) for prompt in prompts]
    sampler = HfSampler(checkpoint, replace(SAMPLING, stops=stops, temperature=temperature), torch.device("cpu"))
    (answers,) = sampler.sample([wanted])
    assert as_lists(answers) == [response] * 4 + [[11] * 12]
    assert [int(answer[-1]) in (END, *stops) for answer in answers] == [True] * 4 + [False]


def test_several_ends_cut_what_one_end_leaves_whole(model: PreTrainedModel) -> None:
    """The random numbers and the tokens before the end stay."""
    whole = as_lists(sample(model, SAMPLING, requests(60)))
    cut = as_lists(sample(model, replace(SAMPLING, stops=(5, 17)), requests(60)))
    expected = []
    for response in whole:
        first = next((place for place, token in enumerate(response) if token in (END, 5, 17)), len(response))
        expected.append(response[: first + 1])
    assert cut == expected
    assert cut != whole


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


# The loop, and the draw of a token.


def transformers_sample(model: PreTrainedModel, sampling: Sampling, wanted: Sequence[SampleRequest]) -> list[TokenIds]:
    """The oracle: the loop of transformers, with a logits processor that forces the tokens."""
    width = max(len(request.prompt_ids) for request in wanted)
    input_ids, mask = (torch.full((len(wanted), width), fill) for fill in (sampling.turn_end, 0))
    for row, request in enumerate(wanted):
        start = width - len(request.prompt_ids)
        input_ids[row, start:], mask[row, start:] = torch.from_numpy(request.prompt_ids.copy()), 1
    uniforms = torch.from_numpy(np.stack([_uniforms(sampling, request) for request in wanted]))

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        tokens = draw(scores, uniforms[:, ids.shape[1] - width], sampling.temperature, sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    model.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, eos_token_id=list(sampling.ends), pad_token_id=0
    )
    loop: Any = model
    output = loop.generate(
        input_ids=input_ids, attention_mask=mask, logits_processor=[force] if sampling.temperature else []
    )
    return [cut_after(row, sampling.ends) for row in output[:, width:].numpy().astype(np.int32)]


@pytest.fixture(scope="module")
def windows() -> PreTrainedModel:
    """A model in bfloat16 with sliding-window and full-attention layers."""
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL | {"vocab_size": 24}, head_dim=8, sliding_window=4, initializer_range=0.2)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return torch.nn.Module.to(model.eval(), torch.bfloat16)


PADDED = requests(20, length=9)
UNPADDED = [SampleRequest(np.array([3 + number, 7, 5], dtype=np.int32), 0) for number in range(8)]


@pytest.mark.parametrize("wanted", [PADDED, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_the_loop_says_what_that_of_transformers_says(
    wanted: list[SampleRequest], temperature: float, top_p: float, model: PreTrainedModel, windows: PreTrainedModel
) -> None:
    settings = replace(SAMPLING, temperature=temperature, top_p=top_p)
    for student in (model, windows):
        assert as_lists(sample(student, settings, wanted)) == as_lists(transformers_sample(student, settings, wanted))


@pytest.fixture
def as_on_a_gpu(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The model is prepared as on a GPU, and checks for ended responses as seldom."""
    monkeypatch.setattr("adpa.pipeline.scoring.hf_sampler.steps_between_checks", lambda _: 16)
    prepared = copy.deepcopy(model)
    avoid_mask_sync(prepared)
    return prepared


@pytest.mark.parametrize("wanted", [PADDED, UNPADDED], ids=["padded", "unpadded"])
def test_a_gpu_that_looks_seldom_says_the_same(
    wanted: list[SampleRequest], model: PreTrainedModel, as_on_a_gpu: PreTrainedModel
) -> None:
    settings = replace(SAMPLING, max_new_tokens=40)
    responses = as_lists(sample(as_on_a_gpu, settings, wanted))
    assert responses == as_lists(sample(model, settings, wanted))
    assert max(map(len, responses)) > 16


# Operations whose result or shape Python needs, so that the host waits.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique"}


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in READS or by_mask
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("wanted", [PADDED, UNPADDED], ids=["padded", "unpadded"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.8), (0.0, 1.0)])
def test_the_host_waits_once_in_sixteen_tokens_beside_the_batch(
    wanted: list[SampleRequest], temperature: float, top_p: float, as_on_a_gpu: PreTrainedModel
) -> None:
    waits = {}
    for new_tokens in (1, 15, 16, 33):
        settings = replace(SAMPLING, max_new_tokens=new_tokens, temperature=temperature, top_p=top_p, turn_end=0)
        with Waits() as counted:
            longest = max(map(len, sample(as_on_a_gpu, settings, wanted)))
        assert longest == new_tokens, "none ends early"
        waits[new_tokens] = counted.count
    per_batch = waits[1]
    assert waits == {1: per_batch, 15: per_batch, 16: per_batch + 1, 33: per_batch + 2}


def test_the_uniform_numbers_go_to_the_device_once_a_batch(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = Counter[torch.dtype]()
    to = Tensor.to

    def count(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        moved[tensor.dtype] += 1
        return to(tensor, *arguments, **options)

    monkeypatch.setattr(Tensor, "to", count)
    sample(model, SAMPLING, PADDED)
    assert moved[torch.float64] == 1


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 5.0])
def test_a_token_is_the_first_whose_share_reaches_beyond_the_number(temperature: float, top_p: float) -> None:
    generator = np.random.default_rng(0)
    logits_BV = (generator.normal(size=(200, 50)) * generator.choice([0.01, 1, 30], size=(200, 1))).astype(np.float32)
    logits_BV[::3, 10:30] = -np.inf
    logits_BV[1] = 0
    uniforms_B = generator.random(200)
    uniforms_B[:2], uniforms_B[2:4] = 0, 1 - 2**-53
    tokens_B = draw(torch.from_numpy(logits_BV), torch.from_numpy(uniforms_B), temperature, top_p).numpy()
    for logits_V, uniform, token in zip(logits_BV.astype(np.float64), uniforms_B, tokens_B, strict=True):
        weights_V = np.exp(logits_V / temperature - logits_V.max() / temperature)
        order_V = np.argsort(-weights_V, kind="stable")
        before_V = np.cumsum(weights_V[order_V]) - weights_V[order_V]
        weights_V[order_V[before_V >= top_p * weights_V.sum()]] = 0
        shares_V = np.cumsum(weights_V) / weights_V.sum()
        assert weights_V[token] > 0
        assert shares_V[token] >= uniform - 1e-12
        assert token == 0 or shares_V[token - 1] <= uniform + 1e-12


def test_logits_that_are_not_finite_at_one_token_of_one_row_are_refused_after_the_batch(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    injected: list[float] = []  # replaces one logit of each token

    def spoil(module: Any, arguments: Any, output: Any) -> None:
        output.logits[3, -1, 7] = injected.pop(0)

    model.register_forward_hook(spoil)
    for bad in (torch.nan, torch.inf):
        for temperature, top_p in ((1.0, 1.0), (1.0, 0.5), (0.0, 1.0)):
            injected[:] = [0, 0, 0, 0, bad, *[0] * 7]
            settings = replace(SAMPLING, turn_end=0, temperature=temperature, top_p=top_p)
            with pytest.raises(ModelError, match="not finite"):
                sample(model, settings, PADDED)
            assert injected == [], "the batch was drawn to its end"
    injected[:] = [-torch.inf] * 12  # a token with probability 0
    assert len(sample(model, replace(SAMPLING, turn_end=0), PADDED)) == len(PADDED)


def test_a_closed_sampler_leaves_no_model_behind(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    load = Checkpoint.load

    def remember(checkpoint: Checkpoint, *arguments: Any) -> PreTrainedModel:
        model = load(checkpoint, *arguments)
        vars(model)["itself"] = model
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Checkpoint, "load", remember)
    gc.disable()
    try:
        sampler = HfSampler(open_checkpoint(str(student)), SAMPLING, torch.device("cpu"))
        list(sampler.sample([UNPADDED]))
        sampler.close()
        assert [reference() for reference in loaded] == [None]
    finally:
        gc.enable()

"""The parts' computations on known answers."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.gpu import models as gpu_models
from benchmarks.gpu.kernels import float32_product, head_flops, outcomes
from benchmarks.gpu.models import LARGE, SHAPES, TINY, encoded_pairs, random_model, text_pairs, text_tokenizer
from benchmarks.gpu.part import Setting
from benchmarks.gpu.scoring import difference
from benchmarks.gpu.trace import covered
from benchmarks.gpu.training import Runs, added, eager_losses
from benchmarks.head_ways import Case, random_inputs

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.chat_template import ChatTemplate
from adpa.kernels.head import distill_head

PLAIN = """
tests/kernels/test_head.py::test_one PASSED [ 50%]
tests/kernels/test_head.py::test_two[FAILED-dtype] FAILED [100%]
=========================== short test summary info ============================
FAILED tests/kernels/test_head.py::test_two[FAILED-dtype] - assert 1 == 2
1 failed, 1 passed in 0.01s
"""
WITH_XDIST = """
[gw0] [ 33%] PASSED tests/kernels/test_head.py::test_one
[gw1] [ 66%] ERROR tests/kernels/test_head.py::test_two
[gw1] [100%] PASSED tests/kernels/test_head.py::test_three
"""


@pytest.fixture
def dry(tmp_path: Path) -> Setting:
    return Setting("cpu", tmp_path, None, float("inf"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PLAIN, {"PASSED": 1, "FAILED": 1, "ERROR": 0}),
        (WITH_XDIST, {"PASSED": 2, "FAILED": 0, "ERROR": 1}),
        ("collecting ...", {"PASSED": 0, "FAILED": 0, "ERROR": 0}),
    ],
)
def test_outcomes_of_tests_are_counted_by_their_lines(text: str, found: dict[str, int]) -> None:
    assert outcomes(text) == found


def test_flops_of_the_head() -> None:
    assert head_flops(Case(2, 3, 5, 1), 8) == 240
    assert head_flops(Case(16384, 131072, 4096, 50), 6) == 52_776_558_133_248


def test_a_product_of_bfloat16_factors_has_float32_sums() -> None:
    one, other = torch.randn(3, 64).bfloat16(), torch.randn(64, 5).bfloat16()
    expected = one.double() @ other.double()
    torch.testing.assert_close(float32_product(one, other).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(5.0, 6.0), (1.0, 3.0)], 3.0),
        ([(1.0, 3.0), (2.0, 5.0)], 4.0),
        ([(1.0, 9.0), (2.0, 3.0), (4.0, 5.0), (8.0, 10.0)], 9.0),
        ([(1.0, 2.0), (2.0, 3.0), (1.0, 2.0)], 2.0),
    ],
)
def test_what_runs_at_the_same_time_is_counted_once(intervals: list[tuple[float, float]], length: float) -> None:
    assert covered(intervals) == length


def test_waits_of_a_step_are_those_that_a_longer_run_adds() -> None:
    def caught(*places: tuple[str, int]) -> list[warnings.WarningMessage]:
        return [warnings.WarningMessage("a wait", UserWarning, f"/somewhere/{file}", line) for file, line in places]

    start, step = [("distill.py", 3), ("trainer.py", 7)], [("trainer.py", 7), ("trainer.py", 9)]
    found = added(caught(*start, *step), caught(*start, *step, *step, *step))
    assert found == {"trainer.py:7": 2, "trainer.py:9": 2}


def test_host_waits_are_counted_for_a_micro_batch(dry: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []

    def distill(self: Runs, max_steps: int, logging_steps: int) -> None:
        for wait in range(5 + 3 * self.micro_batches * max_steps):  # five waits at the start, three in each micro-batch
            warnings.warn(f"called a synchronizing CUDA operation {wait}", stacklevel=1)
            warnings.warn("something else", stacklevel=1)

    monkeypatch.setattr(Runs, "distill", distill)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    (figure,) = Runs(dry).host_waits()
    assert (figure.name, figure.value) == ("host waits a micro-batch", 3.0)
    assert figure.note.startswith("test_parts.py:")
    assert modes == ["warn", "default"] * 2


def test_eager_losses_are_those_of_the_head() -> None:
    inputs = vars(random_inputs(Case(37, 211, 16, 5), "cpu", torch.float64, seed=1))
    inputs["topk_ids"][3, 2:], inputs["teacher_logprobs"][3, 2:] = -1, -torch.inf
    inputs["topk_ids"][4], inputs["teacher_logprobs"][4], inputs["tail_logprob"][4] = -1, -torch.inf, -torch.inf
    for name in ("kl_weight", "advantage_weight"):
        inputs[name] = inputs[name].clone().index_fill(0, torch.tensor([4]), 0)  # row 4 has no signals
    ours, parts = distill_head(**inputs)
    theirs, their_parts = eager_losses(**inputs, bias=None, softcap=None, logit_scale=1.0)
    torch.testing.assert_close(theirs.double(), ours.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(their_parts.nll.double(), parts.nll.double(), rtol=1e-5, atol=1e-6)
    both = (inputs["hidden"], inputs["weight"])
    for found, expected in zip(torch.autograd.grad(theirs, both), torch.autograd.grad(ours, both), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_differences_of_signals() -> None:
    ids_TK = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    exact = SignalRow(b"", np.array([-1.0, -2.0]), ids_TK, np.zeros((2, 4)), np.array([-3.0, -4.0]))
    others_TK = np.array([[4, 3, 2, 1], [5, 6, 9, 10]], np.int32)
    found = SignalRow(b"", np.array([-1.5, -2.0]), others_TK, np.zeros((2, 4)), np.array([-3.0, -4.25]))
    assert difference(found, exact) == (0.75, 0.5, 0.25)


def test_shapes_have_the_parameters_of_the_published_models(dry: Setting) -> None:
    assert SHAPES[LARGE].parameters == 7_615_616_512
    model = random_model(dry, LARGE)
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    embeddings, *_ = model.parameters()
    assert 0.045 < float(embeddings.detach().std()) < 0.055


def test_the_tokenizer_ends_turns_and_splits_the_repository_s_words_into_few_tokens() -> None:
    tokenizer = text_tokenizer()
    assert ChatTemplate(tokenizer).turn_end.token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= gpu_models.TOKENS
    text = "The teacher's top-K log-probabilities — größer 日本"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer(gpu_models.repository_text())["input_ids"]) * 2.5 < len(gpu_models.repository_text())


def test_pairs_are_as_long_as_those_of_a_real_set() -> None:
    pairs = [next(texts) for texts in [text_pairs()] for _ in range(400)]
    for (median, _), name in zip(gpu_models.LENGTHS, ("prompt", "chosen", "rejected"), strict=True):
        length = float(np.median([len(pair[name]) for pair in pairs])) / gpu_models.CHARACTERS
        assert 0.8 * median < length < 1.25 * median


def test_given_pairs_take_the_place_of_the_repository_s(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Why?", "chosen": "So.", "rejected": "No."}\n' * 3)
    pairs = encoded_pairs(Setting("cpu", tmp_path, data, float("inf")), 2)
    assert len(pairs) == 2
    assert text_tokenizer().decode(pairs[0].chosen_ids.tolist()) == "So.<|im_end|>"

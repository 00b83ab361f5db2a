"""The training step against a dense float64 oracle, and its independence from how a step is cut up.

With plain gradient descent the difference between a student before and after one step is its gradient: the whole
command is tested, from the cache on disk to the weights on disk.
"""

import gc
import json
import multiprocessing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.conftest import Filled
from tests.pipeline.training.dense import dense_terms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from adpa import distill
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.data.sequences import Packing
from adpa.errors import ModelError
from adpa.kernels.head import HeadLosses, distill_head
from adpa.pipeline.distill import DistillReport
from adpa.pipeline.training.student import attach_distill_head
from adpa.pipeline.training.trainer import DistillTrainer

RATE = 1000.0
GRADIENT_DESCENT = ["optim=sgd"]


def one_step(filled: Filled, output: Path, **options: Any) -> tuple[DistillReport, dict[str, Tensor]]:
    """Runs one optimizer step over all eight examples; returns the report and the gradient of every parameter."""
    student = options.pop("student", filled.models.student)
    report = distill(
        student=str(student),
        cache=filled.cache,
        output=output,
        batch_size=8,
        max_steps=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
        max_grad_norm=0,
        set=[*GRADIENT_DESCENT, *options.pop("set", [])],
        **options,
    )
    before, after = load_file(student / "model.safetensors"), load_file(output / "model.safetensors")
    return report, {name: (before[name].double() - after[name].double()) / RATE for name in before}


def dense_loss(filled: Filled, model: PreTrainedModel, terms: Mapping[str, tuple[float, float, float]]) -> Tensor:
    """The definition, in float64: one sequence at a time, the whole vocabulary, the signals as they are stored."""
    (scoring,) = read_scorings(filled.cache)
    signals = read_signals(filled.cache, scoring)
    total = torch.zeros((), dtype=torch.float64)
    for responses in read_response_sets(filled.cache):
        nll_weight, kl_weight, advantage_weight = terms.get(responses.info.name, (0.0, 0.0, 0.0))
        if nll_weight == kl_weight == advantage_weight == 0:
            continue
        nll = kl = advantage = torch.zeros((), dtype=torch.float64)
        tokens = 0
        keys = pa.array(responses.table["key"].to_pylist(), pa.binary(16))
        for sequence, number in zip(responses.sequences(), signals.locate(keys), strict=True):
            terms_of_row = dense_terms(model, sequence, signals.row(int(number)))
            nll, kl, advantage = (
                so_far + term for so_far, term in zip((nll, kl, advantage), terms_of_row, strict=True)
            )
            tokens += len(sequence.response_ids)
        total = total + (nll_weight * nll + kl_weight * kl + advantage_weight * advantage) / tokens
    return total


OBJECTIVES = {
    "sft": ({}, {"chosen": (1.0, 0.0, 0.0)}),
    "kd": ({"kl_weight": 0.7}, {"chosen": (1.0, 0.7, 0.0)}),
    "dckd": ({"kl_weight": 0.7}, {"chosen": (1.0, 0.7, 0.0), "rejected": (0.0, 0.7, 0.0)}),
    "adpa": ({"advantage_weight": 0.4, "plausibility": 0.0}, {"chosen": (1.0, 0.0, 0.0), "sampled": (0.0, 0.0, 0.4)}),
}


def relative_error(result: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    difference = sum((result[name] - expected[name]).square().sum() for name in result)
    return float((difference / sum(tensor.square().sum() for tensor in expected.values())) ** 0.5)


def assert_a_step_is_the_definitions(filled: Filled, output: Path, objective: Any, **further: Any) -> None:
    """Runs one step of an objective over all eight examples, and compares its loss and gradient with the oracle's."""
    options, terms = OBJECTIVES[objective]
    report, gradient = one_step(filled, output, objective=objective, **options, **further)
    model = AutoModelForCausalLM.from_pretrained(filled.models.student, dtype=torch.float64)
    loss = dense_loss(filled, model, terms)
    loss.backward()
    expected = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if name in gradient and parameter.grad is not None
    }
    assert report.first_loss == pytest.approx(loss.item(), rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_of_a_step_are_the_definitions(objective: Any, filled: Filled, tmp_path: Path) -> None:
    assert_a_step_is_the_definitions(filled, tmp_path / "out", objective)


@pytest.mark.parametrize("objective", ["adpa", pytest.param("dckd", marks=pytest.mark.slow)])
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(objective: Any, filled: Filled, tmp_path: Path) -> None:
    report, whole = one_step(filled, tmp_path / "whole", objective=objective, micro_batch_size=8)
    for micro_batch_size in (1, 2, 4):
        cut_report, cut = one_step(
            filled, tmp_path / f"cut-{micro_batch_size}", objective=objective, micro_batch_size=micro_batch_size
        )
        assert relative_error(cut, whole) < 1e-5
        assert cut_report.first_loss == pytest.approx(report.first_loss, rel=1e-5)


def test_the_gradient_does_not_depend_on_the_order_of_the_examples(filled: Filled, tmp_path: Path) -> None:
    _, one = one_step(filled, tmp_path / "one", objective="dckd", micro_batch_size=2, seed=1)
    _, two = one_step(filled, tmp_path / "two", objective="dckd", micro_batch_size=2, seed=2)
    assert relative_error(one, two) < 1e-5


def test_gradient_checkpointing_changes_nothing(filled: Filled, tmp_path: Path) -> None:
    _, plain = one_step(filled, tmp_path / "plain", objective="dckd")
    _, checkpointed = one_step(filled, tmp_path / "checkpointed", objective="dckd", gradient_checkpointing=True)
    assert relative_error(checkpointed, plain) < 1e-5


def test_bfloat16_gives_nearly_the_same_gradient(filled: Filled, tmp_path: Path) -> None:
    plain_report, plain = one_step(filled, tmp_path / "plain", objective="dckd")
    report, bf16 = one_step(filled, tmp_path / "bf16", objective="dckd", bf16=True)
    assert 1e-6 < relative_error(bf16, plain) < 0.05
    assert (plain_report.compute_dtype, plain_report.weights_dtype) == ("float32", "float32")
    assert (report.compute_dtype, report.weights_dtype) == ("bfloat16", "float32")
    record = json.loads((tmp_path / "bf16" / "adpa.json").read_text())
    assert (record["compute_dtype"], record["weights_dtype"]) == ("bfloat16", "float32")


def test_the_logged_terms_add_up_to_the_loss(filled: Filled, tmp_path: Path) -> None:

    one_step(filled, tmp_path, objective="adpa", advantage_weight=0.4, micro_batch_size=2)
    (log,) = json.loads((tmp_path / "adpa.json").read_text())["losses"]
    assert log["loss"] == pytest.approx(log["nll/chosen"] + 0.4 * log["advantage/sampled"], rel=1e-5)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(filled: Filled, tmp_path: Path) -> None:
    def train(output: Path, resume: str | None = None, **options: Any) -> dict[str, Tensor]:
        distill(
            objective="dckd",
            student=str(filled.models.student),
            cache=filled.cache,
            output=output,
            batch_size=4,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-3,
            resume_from_checkpoint=resume,
            **options,
        )
        return load_file(output / "model.safetensors")

    whole = train(tmp_path / "whole")
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(interrupted / "checkpoint-2")
    (tmp_path / "whole" / "adpa.json").rename(interrupted / "adpa.json")
    resumed = train(interrupted, resume="last")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_stops_the_run(filled: Filled, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(filled.models.student)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = torch.nan
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in filled.models.student.glob("*token*"):
        (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match="the loss is nan"):
        one_step(filled, tmp_path / "out", objective="kd", student=broken)


def test_a_run_shorter_than_the_logging_interval_is_checked_and_logged(filled: Filled, tmp_path: Path) -> None:
    brief: dict[str, Any] = {"batch_size": 8, "max_steps": 4, "logging_steps": 100, "warmup_steps": 0}
    student, cache = str(filled.models.student), filled.cache
    report = distill("sft", student, cache, tmp_path / "good", learning_rate=1e-3, **brief)
    assert report.last_loss > 0
    with pytest.raises(ModelError, match="the loss is"):
        distill("sft", student, cache, tmp_path / "bad", learning_rate=1e30, **brief)
    assert not (tmp_path / "bad" / "model.safetensors").exists()


def test_numbers_of_set_may_have_an_exponent(filled: Filled, tmp_path: Path) -> None:
    distill("sft", str(filled.models.student), filled.cache, tmp_path, max_steps=1, set=["adam_epsilon=1e-6"])


def test_frozen_parameters_stay(filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze_embeddings_and_attach(model: PreTrainedModel) -> None:
        model.get_input_embeddings().weight.requires_grad_(False)
        attach_distill_head(model)

    _, plain = one_step(filled, tmp_path / "plain", objective="dckd")
    monkeypatch.setattr("adpa.pipeline.training.run.attach_distill_head", freeze_embeddings_and_attach)
    _, frozen = one_step(filled, tmp_path / "frozen", objective="dckd")
    embedding = "model.embed_tokens.weight"
    assert (frozen.pop(embedding) == 0).all()
    del plain[embedding]
    assert relative_error(frozen, plain) < 1e-5


class CountWaits(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that are read from a tensor, and sizes that depend on them."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", ["none", "prompts"])
def test_a_micro_batch_does_not_wait_for_the_device(
    packing: Packing, few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the loss; behind it the head looks at the upstream gradient on a CPU alone."""
    compute_loss, counter = DistillTrainer.compute_loss, CountWaits()

    def counted(*arguments: Any, **options: Any) -> Tensor:
        with counter:
            return compute_loss(*arguments, **options)

    monkeypatch.setattr(DistillTrainer, "compute_loss", counted)
    one_step(few_words, tmp_path, objective="adpa", kl_weight=0.5, packing=packing)
    assert not counter.waits


def test_workers_that_read_the_cache_change_no_bit(filled: Filled, tmp_path: Path) -> None:
    """Through two epochs, and after a checkpoint in the middle of the second one."""

    def train(output: Path, workers: int, **options: Any) -> dict[str, Tensor]:
        own = [f"dataloader_num_workers={workers}", f"dataloader_persistent_workers={bool(workers)}"]
        brief: dict[str, Any] = {"batch_size": 2, "num_train_epochs": 2, "save_steps": 6, "learning_rate": 1e-3}
        distill("dckd", str(filled.models.student), filled.cache, output, **brief, set=own, **options)
        return load_file(output / "model.safetensors")

    expected = train(tmp_path / "none", 0)
    gc.disable()
    try:
        result = train(tmp_path / "two", 2)
        assert not multiprocessing.active_children(), "left to the garbage collector"
    finally:
        gc.enable()
    (tmp_path / "resumed").mkdir()
    for kept in ("checkpoint-6", "adpa.json"):
        (tmp_path / "two" / kept).rename(tmp_path / "resumed" / kept)
    resumed = train(tmp_path / "resumed", 2, resume_from_checkpoint="last")
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("objective", ["adpa", pytest.param("dckd", marks=pytest.mark.slow)])
def test_a_run_has_the_same_losses_with_either_backend(
    objective: Literal["dckd", "adpa"], filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(backend: Literal["torch", "triton"]) -> list[float]:
        values = []

        def watched_head(hidden: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, HeadLosses]:
            result = distill_head(hidden, weight, **options, backend=backend)
            values.append(result[0].item())
            return result

        monkeypatch.setattr("adpa.pipeline.training.student.distill_head", watched_head)
        student, output = str(filled.models.student), tmp_path / backend
        distill(objective, student, filled.cache, output, batch_size=2, max_steps=3, learning_rate=1e-3, warmup_steps=0)
        return values[1:]  # the first is the rehearsal's

    monkeypatch.setattr("adpa.kernels.loss_rows.TILE_BYTES", 2**18)  # one tile a row: Triton's interpreter is slow
    by_torch = losses("torch")
    assert len(set(by_torch)) == 3
    assert losses("triton") == pytest.approx(by_torch, rel=1e-5)

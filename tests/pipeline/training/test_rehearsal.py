"""Before the first step a run computes its largest micro-batch once: it fits, or fails at once, and nothing changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.conftest import Filled
from torch import Tensor, nn

from adpa import distill
from adpa.data.sequences import Packing
from adpa.errors import OptionError
from adpa.pipeline.distill import DistillReport
from adpa.pipeline.training.rehearsal import copies_to_come
from adpa.pipeline.training.trainer import DistillTrainer

Train = Callable[..., DistillReport]


@pytest.fixture
def train(few_words: Filled, tmp_path: Path) -> Train:
    """Trains a student with dropout, so that random numbers count."""
    student = shutil.copytree(few_words.models.student, tmp_path / "student")
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.3}))

    def run(name: str, **options: Any) -> DistillReport:
        brief: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "num_train_epochs": 2}
        return distill("adpa", str(student), few_words.cache, tmp_path / name, on="chosen", **brief | options)

    return run


def test_a_rehearsal_leaves_no_trace(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed = train("rehearsed")
    monkeypatch.setattr(DistillTrainer, "_rehearse", lambda *_: False)
    alone = train("alone")
    assert rehearsed.first_loss == alone.first_loss
    rehearsed_weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("rehearsed", "alone"))
    assert all(torch.equal(rehearsed_weights[name], expected[name]) for name in expected)
    logs = [json.loads((tmp_path / name / "adpa.json").read_text())["losses"] for name in ("rehearsed", "alone")]
    terms = [{key: value for key, value in each[-1].items() if "/" in key} for each in logs]
    assert terms[0] == terms[1]
    assert terms[0]


@pytest.mark.parametrize("packing", ["none", "sequences"])
def test_it_is_of_the_largest_micro_batch(
    packing: Packing, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss, tokens = DistillTrainer.compute_loss, []

    def watched(self: DistillTrainer, model: nn.Module, inputs: dict[str, Tensor], *rest: Any, **options: Any) -> Any:
        tokens.append(inputs["input_ids"].numel())
        return compute_loss(self, model, inputs, *rest, **options)

    monkeypatch.setattr(DistillTrainer, "compute_loss", watched)
    train("out", packing=packing)
    assert len(set(tokens)) > 1
    assert tokens[0] == max(tokens[1:])


def test_a_run_that_does_not_fit_says_so_before_its_first_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DistillTrainer, "compute_loss", no_memory)
    monkeypatch.setattr(DistillTrainer, "training_step", lambda *_: pytest.fail("a step"))
    message = r"--micro-batch-size 2: cpu has no memory for \d+ sequences of up to \d+ tokens; lower it, or use"
    with pytest.raises(OptionError, match=message):
        train("out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("optim", "copies"), [("adamw_torch", 2), ("sgd", 0)])
def test_there_is_room_for_what_the_optimizer_will_keep(
    optim: str, copies: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(*arguments: Any) -> int:
        asked.append(copies_to_come(*arguments))
        return asked[-1]

    monkeypatch.setattr("adpa.pipeline.training.trainer.copies_to_come", watched)
    train("out", set=[f"optim={optim}"], max_steps=1)
    assert asked == [copies]


@pytest.mark.parametrize(("micro_batch_size", "passes"), [(4, 1), (2, 2), (1, 2)])
def test_a_gradient_is_there_while_the_next_one_is_computed_if_that_is_so_in_a_step(
    micro_batch_size: int, passes: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss, has_gradient = DistillTrainer.compute_loss, []

    def watched(self: DistillTrainer, model: nn.Module, *rest: Any, **options: Any) -> Any:
        has_gradient.append(any(each.grad is not None for each in model.parameters()))
        return compute_loss(self, model, *rest, **options)

    monkeypatch.setattr(DistillTrainer, "compute_loss", watched)
    monkeypatch.setattr(DistillTrainer, "training_step", lambda self, *_: torch.zeros(()))
    train("out", micro_batch_size=micro_batch_size, max_steps=1)
    assert has_gradient == [False, True][:passes]

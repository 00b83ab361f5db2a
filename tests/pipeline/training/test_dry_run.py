"""The plan of a run: it counts what the run then does, shows what is trained, and writes nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel
from tests.pipeline.conftest import Filled
from transformers import TrainingArguments

from adpa import DistillPlan, distill
from adpa.errors import OptionError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.training.dry_run import SHOWN_TOKENS, pieces_of
from adpa.pipeline.training.memory_estimate import FakeStudent
from adpa.pipeline.training.trainer import DistillTrainer

BRIEF: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2}


def plan_of(filled: Filled, objective: Any = "dckd", **options: Any) -> DistillPlan:
    return distill(
        objective,
        str(filled.models.student),
        filled.cache,
        filled.cache.parent / "none",
        dry_run=True,
        **BRIEF | options,
    )


@pytest.mark.parametrize(
    ("objective", "counting", "packing"),
    [("sft", {0}, "none"), ("dckd", {0, 1}, "sequences"), ("adpa", {0, 1}, "prompts"), ("adpa", {0, 1}, "none")],
)
def test_the_tokens_are_those_of_the_batches_of_training(
    objective: Any, counting: set[int], packing: Any, few_words: Filled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against the batches that a run collates, the rehearsal's and those that watch the student aside."""
    steps: list[list[dict[str, Any]]] = []
    real = DistillTrainer.get_batch_samples

    def take(self: Any, *arguments: Any) -> Any:
        batches, count = real(self, *arguments)
        steps.append(batches)
        return batches, count

    plan = plan_of(few_words, objective, packing=packing, num_train_epochs=1.5)
    monkeypatch.setattr(DistillTrainer, "get_batch_samples", take)
    options = {**BRIEF, "packing": packing, "num_train_epochs": 1.5}
    done = distill(objective, str(few_words.models.student), few_words.cache, tmp_path, **options)
    steps = list(filter(None, steps))
    trained = [sum(int(np.isin(one["set_number"], list(counting)).sum()) for one in step) for step in steps]
    computed = [sum(one["input_ids"].numel() for one in step) for step in steps]
    assert plan.steps == done.steps == len(steps) == 3
    assert plan.tokens is not None
    assert dataclasses.astuple(plan.tokens.trained) == (sum(trained) / 3, max(trained), sum(trained))
    if packing == "prompts":  # prompts that several examples share are not counted as shared
        assert plan.tokens.computed.total >= sum(computed)
    else:
        assert dataclasses.astuple(plan.tokens.computed) == (sum(computed) / 3, max(computed), sum(computed))


def test_a_resumed_run_has_the_steps_that_are_left(few_words: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {**BRIEF, "num_train_epochs": 3}
    whole = plan_of(few_words, "sft", **options)
    student, output = str(few_words.models.student), tmp_path / "out"
    distill("sft", student, few_words.cache, output, save_steps=4, **options)
    rest = distill(
        "sft",
        student,
        few_words.cache,
        output,
        resume_from_checkpoint=str(output / "checkpoint-4"),
        dry_run=True,
        **options,
    )
    assert (whole.steps, whole.steps_done, rest.steps, rest.steps_done) == (6, 0, 6, 4)
    assert whole.tokens is not None
    assert rest.tokens is not None
    assert rest.tokens.trained.total == whole.tokens.trained.total // 3  # the last of three epochs
    ended = distill(
        "sft",
        student,
        few_words.cache,
        output,
        resume_from_checkpoint=str(output / "checkpoint-6"),
        dry_run=True,
        **options,
    )
    assert (ended.tokens, ended.memory, ended.first_batch) == (None, None, [])


def test_held_out_examples_are_counted_apart(filled: Filled) -> None:
    whole, part = plan_of(filled, "sft"), plan_of(filled, "sft", validation="0.25")
    assert (whole.examples, whole.validation_examples) == (8, 0)
    assert (part.examples, part.validation_examples) == (6, 2)
    assert part.tokens is not None
    assert whole.tokens is not None
    assert part.tokens.trained.total < whole.tokens.trained.total


def text_of(plan: DistillPlan, number: int, trained: bool) -> str:
    return "".join(piece.text for piece in plan.first_batch[number].pieces if piece.trained == trained)


def test_the_first_batch_shows_what_is_trained(filled: Filled) -> None:
    plan = plan_of(filled)
    sets = [(one.example, one.response_set, one.terms) for one in plan.first_batch]
    both = {"nll": 1.0, "kl": 1.0}
    assert sets == [
        (1, "chosen", both),
        (1, "rejected", {"kl": 1.0}),
        (2, "chosen", both),
        (2, "rejected", {"kl": 1.0}),
    ]
    assert text_of(plan, 0, False).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(plan, 0, True).endswith("<|im_end|>")
    longest = max(one.prompt_tokens + one.response_tokens for one in plan.first_batch)
    for one in plan.first_batch:
        assert one.trained_tokens == one.response_tokens
        assert one.prompt_tokens + one.response_tokens + one.padding == longest
        assert [piece.special for piece in one.pieces if piece.text.startswith("<|im_")] == [True] * 6


def test_a_response_without_a_term_is_not_marked(filled: Filled) -> None:
    plan = plan_of(filled, kl_weight=0.0)
    assert [(one.terms, one.trained_tokens > 0) for one in plan.first_batch[:2]] == [({"nll": 1.0}, True), ({}, False)]
    assert text_of(plan, 1, True) == ""


def test_packed_sequences_have_no_padding(filled: Filled) -> None:
    assert {one.padding for one in plan_of(filled, packing="sequences").first_batch} == {0}


@pytest.mark.parametrize(
    ("prompt", "response", "left_out"), [(10, 10, []), (200, 5, [120]), (10, 100, [20]), (99, 99, [19, 19])]
)
def test_long_texts_are_cut_in_the_middle_and_the_tokens_counted(
    prompt: int, response: int, left_out: list[int], small_tokenizer: Any
) -> None:
    ids = np.arange(100, 100 + prompt + response)
    trained = np.arange(prompt + response) >= prompt
    pieces = pieces_of(ids, trained, prompt, set(), small_tokenizer)
    assert [piece.left_out for piece in pieces if piece.left_out] == left_out
    shown = "".join(piece.text for piece in pieces)
    start = small_tokenizer.decode(ids[: min(prompt, SHOWN_TOKENS)])
    assert shown.startswith(start.rstrip("\N{REPLACEMENT CHARACTER}")[:20])


@pytest.mark.parametrize(
    ("options", "per_trained"),
    [
        ({}, 2.0),
        ({"set": ["optim=sgd"]}, 0.0),
        ({"set": ["optim=rmsprop"]}, 1.0),
        ({"dtype": "bfloat16"}, 2.0),
        ({"lora_rank": 4}, 2.0),
    ],
)
def test_weights_gradients_and_states_are_counted_by_dtype(
    options: dict[str, Any], per_trained: float, filled: Filled
) -> None:
    plan = plan_of(filled, "sft", **options)
    memory = plan.memory
    assert memory is not None
    itemsize = 2 if "dtype" in options else 4
    assert memory.weights == itemsize * plan.parameters
    assert memory.gradients == itemsize * plan.trained_parameters
    assert memory.optimizer == per_trained * memory.gradients
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.loss_head)
    assert memory.total == sum(part or 0 for part in parts)
    assert (plan.trained_parameters < plan.parameters) == ("lora_rank" in options)


@pytest.mark.parametrize("layers", [1, 4, 7])
def test_the_activations_are_what_a_real_forward_pass_keeps(layers: int, make_model: MakeModel, tmp_path: Path) -> None:
    """Against the tensors that autograd saves for a batch with numbers; the first four layers stand for all."""
    checkpoint = Checkpoint("student", None, make_model(5, layers=layers))
    student = FakeStudent(checkpoint.without_weights("float32"), torch.device("cpu"))
    estimate = student.activation_bytes(3, 40, TrainingArguments(str(tmp_path), use_cpu=True))
    model = checkpoint.load("float32", torch.device("cpu"))
    own = {each.untyped_storage().data_ptr() for each in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, so that no other tensor takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.ones(3, 40, dtype=torch.long), use_cache=False)
    assert estimate == pytest.approx(sum(size for size, _ in saved.values()), rel=0.02)


def test_gradient_checkpointing_keeps_one_layer_and_the_inputs_of_all(make_model: MakeModel, tmp_path: Path) -> None:
    checkpoint = Checkpoint("student", None, make_model(5, layers=7))

    def activations(**options: Any) -> int:
        student = FakeStudent(checkpoint.without_weights("float32"), torch.device("cpu"))
        return student.activation_bytes(3, 40, TrainingArguments(str(tmp_path), use_cpu=True, **options)) or 0

    whole, less = activations(), activations(gradient_checkpointing=True)
    width, itemsize = 32, 4
    assert 7 * 3 * 40 * width * itemsize < less < whole / 3


def test_no_weight_is_loaded_and_nothing_is_written(
    filled: Filled, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(Checkpoint, "load", fail)
    before = sorted(filled.cache.parent.rglob("*"))
    distill("dckd", str(filled.models.student), filled.cache, tmp_path / "new", dry_run=True, **BRIEF)
    (tmp_path / "empty").mkdir()
    distill("dckd", str(filled.models.student), filled.cache, tmp_path / "empty", dry_run=True, **BRIEF)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "empty"]
    assert sorted(filled.cache.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3}, "--micro-batch-size 2 does not divide"),
        ({"lora_rank": 1000}, "--lora-rank 1000: larger than the layer"),
        ({"lora_rank": 4, "lora_target": "nonsense"}, "--lora-target nonsense"),
    ],
)
def test_it_refuses_what_a_run_refuses(options: dict[str, Any], message: str, filled: Filled) -> None:
    with pytest.raises(OptionError, match=message):
        plan_of(filled, **options)


def test_it_refuses_an_output_that_is_not_empty(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(OptionError, match="not empty, found old"):
        distill("sft", str(filled.models.student), filled.cache, tmp_path, dry_run=True)

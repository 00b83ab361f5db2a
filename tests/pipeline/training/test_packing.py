"""The packed training step has the loss and the gradient of the padded one, and of the definition."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tests.data.makers import teacher_row
from tests.pipeline.conftest import SMALL, AtOnce, Filled, synthetic
from tests.pipeline.models.test_lm_head import CONFIGS, build
from tests.pipeline.models.test_packed_attention import WAYS
from tests.pipeline.training.test_trainer import (
    OBJECTIVES,
    assert_a_step_is_the_definitions,
    one_step,
    relative_error,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config

from adpa import distill
from adpa.data.batches import TrainingSequence, collate
from adpa.data.cache.responses import read_response_sets
from adpa.data.sequences import Packing
from adpa.errors import ModelError
from adpa.pipeline.models.packed_attention import allow_packing
from adpa.pipeline.training.student import attach_distill_head

PACKINGS: tuple[Packing, ...] = ("sequences", "prompts")


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_of_a_packed_step_are_the_definitions(
    objective: Any, packing: Packing, few_words: Filled, tmp_path: Path
) -> None:
    """Of all eight examples, which have equal prompts with a chosen, a rejected and two sampled responses."""
    assert_a_step_is_the_definitions(few_words, tmp_path, objective, packing=packing)


@pytest.mark.parametrize(
    ("packing", "options"),
    [
        ("sequences", {"micro_batch_size": 2}),
        ("prompts", {"micro_batch_size": 1}),
        ("prompts", {"micro_batch_size": 8}),
        ("prompts", {"gradient_checkpointing": True}),
        ("prompts", {"lora_rank": 4}),
    ],
    ids=["sequences by two", "prompts by one", "prompts at once", "prompts checkpointed", "prompts with adapters"],
)
def test_a_packed_step_is_the_padded_one(
    packing: Packing, options: dict[str, Any], few_words: Filled, tmp_path: Path, at_once: AtOnce
) -> None:
    padded_report, padded = one_step(few_words, tmp_path / "padded", objective="adpa", kl_weight=0.3, **options)
    for way in WAYS:
        calls = at_once() if way == "at once" else []
        report, packed = one_step(
            few_words, tmp_path / way, objective="adpa", kl_weight=0.3, packing=packing, **options
        )
        assert bool(calls) == (way == "at once")
        assert report.first_loss == pytest.approx(padded_report.first_loss, rel=1e-5)
        assert relative_error(packed, padded) < 1e-5
        logs = [json.loads((tmp_path / name / "adpa.json").read_text())["student_before"] for name in ("padded", way)]
        for name in ("entropy", "mass_on_topk", "implausible_mass", "advantage"):
            before, now = (log[f"student/{name}"] for log in logs)
            assert now == pytest.approx(before, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("packing", PACKINGS)
def test_bfloat16_gives_nearly_the_same_gradient_packed(
    packing: Packing, few_words: Filled, tmp_path: Path, at_once: AtOnce
) -> None:
    _, plain = one_step(few_words, tmp_path / "plain", objective="dckd")
    _, padded = one_step(few_words, tmp_path / "padded", objective="dckd", bf16=True)
    for way in WAYS:
        calls = at_once() if way == "at once" else []
        _, packed = one_step(few_words, tmp_path / way, objective="dckd", bf16=True, packing=packing)
        assert bool(calls) == (way == "at once")
        assert all(call["dtypes"] == {torch.bfloat16} for call in calls[2:])  # after the two layers' comparison
        assert 1e-6 < relative_error(packed, plain) < 1.1 * relative_error(padded, plain)


def weighted_step(name: str, batch: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a small model in float64, with weights that are different for every row."""
    model = build(CONFIGS[name])
    torch.nn.Module.double(model)
    attach_distill_head(model)
    if "key_places" in batch:
        allow_packing(model)
    weights = {
        f"{term}_weight": torch.linspace(0.1 + place, 1, len(batch["labels"]))
        for place, term in enumerate(("nll", "kl", "advantage"))
    }
    loss, _ = model(**{key: tensor for key, tensor in batch.items() if key != "set_number"}, **weights)
    loss.backward()
    return loss.item(), {key: each.grad.double() for key, each in model.named_parameters() if each.grad is not None}


LAYOUTS: dict[str, list[list[tuple[Sequence[int], Sequence[int]]]]] = {
    "one token each": [[([5], [6]), ([5], [7])], [([8], [6])]],
    "one-token responses": [[([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6, 7], [8])]],
    "several samples": [[([5, 6], [7, 2]), ([5, 6], [8, 9, 10, 2]), ([5, 6], [2]), ([5, 6], [7, 7, 7])]],
    "a prompt cut in another place": [[(range(3, 20), [7, 8, 2]), (range(6, 20), [9, 2])], [([5, 6], [7, 2])]],
    "a prompt of two examples": [[(range(3, 40), [7, 8, 2])], [(range(3, 40), [9, 2])], [([5], range(3, 30))]],
    "one sequence": [[([5, 6, 7], [8, 2])]],
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["plain", "another family"])
def test_odd_sequences_have_the_loss_and_the_gradient_of_padded_ones(
    name: str, layout: str, packing: Packing, at_once: AtOnce
) -> None:
    examples = []
    for example in LAYOUTS[layout]:
        sequences = [synthetic(np.array(prompt), np.array(response)) for prompt, response in example]
        examples.append(
            [
                TrainingSequence(number, each, teacher_row(each.key, len(each.response_ids), number, 5, vocabulary=96))
                for number, each in enumerate(sequences)
            ]
        )
    loss, gradient = weighted_step(name, collate(examples))
    for way in WAYS:
        calls = at_once() if way == "at once" else []
        packed_loss, packed_gradient = weighted_step(name, collate(examples, packing))
        assert bool(calls) == (way == "at once")
        assert packed_loss == pytest.approx(loss, rel=1e-9)
        assert relative_error(packed_gradient, gradient) < 1e-6  # norms are float32 in transformers


def test_logs_and_record_have_the_tokens_of_the_sequences_whatever_the_packing(
    few_words: Filled, tmp_path: Path
) -> None:
    sets = read_response_sets(few_words.cache)
    trained = [responses for responses in sets if responses.info.name != "sampled"]
    expected = sum(len(sequence) for responses in trained for sequence in responses.sequences())
    for packing in get_args(Packing):
        report = distill(
            "dckd",
            str(few_words.models.student),
            few_words.cache,
            tmp_path / packing,
            packing=packing,
            batch_size=4,
            max_steps=6,
            logging_steps=2,
        )
        record = json.loads((tmp_path / packing / "adpa.json").read_text())
        assert [log["tokens"] for log in record["losses"]] == [expected] * 3  # an epoch is two steps
        assert record["packing"] == packing
        rates = [log["tokens_per_second"] for log in record["losses"]]
        assert record["tokens_per_second"] == report.tokens_per_second
        assert min(rates) <= report.tokens_per_second <= max(rates)


def test_a_student_that_mixes_packed_sequences_is_refused_before_training(few_words: Filled, tmp_path: Path) -> None:
    student = tmp_path / "student"
    vocabulary = len(AutoTokenizer.from_pretrained(few_words.models.student))
    config = Lfm2Config(**SMALL | {"vocab_size": vocabulary}, layer_types=["conv", "full_attention"])
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(student)
    AutoTokenizer.from_pretrained(few_words.models.student).save_pretrained(student)
    with pytest.raises(ModelError, match=r"Lfm2ForCausalLM cannot be given packed sequences.*leave out --packing"):
        distill("dckd", str(student), few_words.cache, tmp_path / "out", packing="prompts", max_steps=1)
    assert not (tmp_path / "out").exists()

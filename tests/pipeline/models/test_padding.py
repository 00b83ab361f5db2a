"""Models whose padded batches have other numbers than single sequences: seen, divided, or refused."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.conftest import Filled, synthetic
from tests.pipeline.models.test_lm_head import CONFIGS, build
from torch import Tensor
from transformers import PreTrainedModel

from adpa import distill
from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.models.padding import (
    Grouping,
    check_padding,
    choose_grouping,
    in_groups,
    response_rows,
    trial_sequences,
)
from adpa.pipeline.scoring.hf_scorer import HfDecoder

BATCH = [synthetic([5, 6, 7], [8, 9]), synthetic([10], [11]), synthetic([12, 13], [14, 15, 16]), synthetic([17], [18])]
Change = Callable[[Tensor], Tensor]

# Faults of a decoder with hidden states [B, L, d], and the largest groups in which they change nothing.
FAULTS: dict[str, tuple[Change, Grouping]] = {
    "none": (lambda hidden: hidden, "padded"),
    "rounding": (lambda hidden: hidden * (1 + 1e-6 * hidden.shape[1]), "padded"),
    "counts the columns": (lambda hidden: hidden + 0.5 * hidden.shape[1], "equal lengths"),
    "takes the last column": (lambda hidden: hidden + hidden[:, -1:], "equal lengths"),
    "mixes the sequences": (lambda hidden: hidden + hidden.mean(dim=0), "single"),
    "takes the last sequence": (lambda hidden: hidden + hidden[-1:], "single"),
    "counts the columns beside an infinite number": (
        lambda hidden: torch.cat([hidden[..., 1:] + 0.5 * hidden.shape[1], -torch.inf * hidden[..., :1].abs()], dim=2),
        "equal lengths",
    ),
    "is not finite": (lambda hidden: hidden + torch.nan, "padded"),
}


def spoil(model: PreTrainedModel, change: Change) -> PreTrainedModel:
    def hook(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    model.base_model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("name", FAULTS)
def test_the_largest_groups_without_a_fault_are_chosen(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, expected = FAULTS[name]
    model = spoil(build(CONFIGS["plain"]), change)
    grouping = choose_grouping(model, trial_sequences(model), len, partial(response_rows, model))
    assert grouping == expected
    assert [message.partition(" ")[0] for message in caplog.messages] == ["LlamaForCausalLM"] * (expected != "padded")


@pytest.mark.parametrize("name", [name for name in FAULTS if "finite" not in name])
def test_the_rows_of_a_divided_batch_are_those_of_single_sequences_in_order(name: str) -> None:
    change, grouping = FAULTS[name]
    model = spoil(build(CONFIGS["plain"]), change)
    (found,) = HfDecoder(model, grouping).response_hidden([BATCH])
    expected = [next(HfDecoder(model).response_hidden([[sequence]])) for sequence in BATCH]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("grouping", "groups"),
    [
        ("padded", [["aa", "b", "cc", "d", "eee"]]),
        ("equal lengths", [["aa", "cc"], ["b", "d"], ["eee"]]),
        ("single", [["aa"], ["b"], ["cc"], ["d"], ["eee"]]),
    ],
)
def test_groups_are_computed_one_by_one_and_the_results_have_the_order_of_the_items(
    grouping: Grouping, groups: list[list[str]]
) -> None:
    seen: list[list[str]] = []

    def compute(items: Sequence[str]) -> list[str]:
        seen.append(list(items))
        return [item.upper() for item in items]

    assert in_groups(grouping, ["aa", "b", "cc", "d", "eee"], len, compute) == ["AA", "B", "CC", "D", "EEE"]
    assert seen == groups


@pytest.mark.parametrize("vocabulary", [22, 24, 96, 49152])
def test_the_trial_has_valid_different_tokens_and_lengths_with_and_without_a_mate(vocabulary: int) -> None:
    model = build(CONFIGS["plain"])
    model.config.vocab_size = vocabulary
    trial = trial_sequences(model)
    ids = [int(token) for sequence in trial for part in (sequence.prompt_ids, sequence.response_ids) for token in part]
    assert len(set(ids)) == len(ids)
    assert 0 <= min(ids) <= max(ids) < vocabulary
    for lengths in ([len(sequence) for sequence in trial], [len(sequence.prompt_ids) for sequence in trial]):
        assert sorted(lengths.count(length) for length in set(lengths)) == [1, 1, 2]


@pytest.mark.parametrize("name", ["none", "rounding", "is not finite"])
def test_a_student_without_a_fault_is_trained(name: str) -> None:
    model = spoil(build(CONFIGS["plain"]), FAULTS[name][0]).train()
    check_padding(model)
    assert model.training


@pytest.mark.parametrize("packing", ["none", "sequences"])
@pytest.mark.parametrize("name", ["counts the columns", "takes the last column", "mixes the sequences"])
def test_a_student_whose_padded_batches_have_other_numbers_is_not_trained(
    name: str, packing: Any, few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda *arguments: spoil(load(*arguments), FAULTS[name][0]))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be trained: .* in a padded batch; use a student"):
        distill("sft", str(few_words.models.student), few_words.cache, tmp_path, packing=packing)


def test_the_warning_names_the_model_and_what_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    model = spoil(build(CONFIGS["plain"]), FAULTS["counts the columns"][0])
    with caplog.at_level(logging.WARNING, "adpa"):
        choose_grouping(model, trial_sequences(model), len, partial(response_rows, model))
    assert caplog.messages == [
        "LlamaForCausalLM has other numbers for a sequence in a padded batch than for the sequence alone; it takes "
        "batches of equal length, and more time"
    ]

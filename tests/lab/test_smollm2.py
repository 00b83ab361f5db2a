"""The workflow of the README on SmolLM2's real weights, tokenizer and template, on a few pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Row, WriteRows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from adpa import distill, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import ModelError
from adpa.lab.smollm2 import drop_layers, pre_tokenizer


def losses(run: Path) -> list[dict[str, float]]:
    logged: list[dict[str, float]] = json.loads((run / "adpa.json").read_text())["losses"]
    return logged


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_four_commands_align_a_layer_dropped_smollm2(
    smollm2: Path, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    data, cache = str(write_rows(preference_rows[:4])), tmp_path / "cache"
    student, reference = tmp_path / "student", tmp_path / "reference"
    drop_layers(smollm2, 2, student)
    brief: dict[str, Any] = {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}

    report = precompute(str(smollm2), data, cache)
    assert (report.scored, report.truncated_responses) == (8, 0)
    distill("sft", str(smollm2), cache, reference, batch_size=1, max_steps=1, learning_rate=1e-4, warmup_steps=0)
    distill("dckd", str(student), cache, tmp_path / "dckd", **brief)
    precompute(str(smollm2), data, cache, reference=str(reference), student=str(tmp_path / "dckd"), max_new_tokens=8)
    distill("adpa", str(tmp_path / "dckd"), cache, tmp_path / "adpa-plus", **brief)

    dckd, adpa_plus = losses(tmp_path / "dckd"), losses(tmp_path / "adpa-plus")
    for term in ("loss", "nll/chosen", "kl/chosen", "kl/rejected"):
        assert dckd[-1][term] < dckd[0][term]
    for term in ("loss", "nll/chosen"):
        assert adpa_plus[-1][term] < adpa_plus[0][term]
    assert any(entry["advantage/sampled"] != 0 for entry in adpa_plus)

    # The stored signals agree with the models' float32 log-probabilities over the whole vocabulary.
    scoring = next(found for found in read_scorings(cache) if found.reference is not None)
    sampled = next(found for found in read_response_sets(cache) if found.info.name == "sampled")
    signals = read_signals(cache, scoring)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (smollm2, reference)]
    for sequence, number in zip(sampled.sequences(), signals.locate(sampled.table["key"]), strict=True):
        row = signals.row(int(number))
        whole = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()[None]
        with torch.inference_mode():
            teacher, before = (
                model(input_ids=whole).logits[0, len(sequence.prompt_ids) - 1 : -1].log_softmax(-1).numpy()
                for model in models
            )
        assert [set(ids) for ids in row.topk_ids] == [set(ids) for ids in np.argsort(-teacher, axis=1)[:, :50]]
        logprobs = np.take_along_axis(teacher, row.topk_ids, axis=1)
        error = np.abs(row.topk_logprobs.astype(np.float32) - logprobs)
        assert (error <= np.where(logprobs > -8, 2e-3, np.abs(logprobs) * 2**-11 + 1e-4)).all()
        assert row.topk_advantages is not None
        advantages = logprobs - np.take_along_axis(before, row.topk_ids, axis=1)
        np.testing.assert_allclose(row.topk_advantages, advantages, rtol=2**-11, atol=2e-4)


def test_a_layer_dropped_copy_keeps_layers_from_the_first_to_the_last(smollm2: Path, tmp_path: Path) -> None:
    drop_layers(smollm2, 3, tmp_path)
    whole, copy = (AutoModelForCausalLM.from_pretrained(path).get_decoder().layers for path in (smollm2, tmp_path))
    assert len(copy) == 3
    for place, origin in enumerate((0, 14, 29)):
        torch.testing.assert_close(copy[place].mlp.up_proj.weight, whole[origin].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("1234", [33, 34, 35, 36]),
        ("2024-11-05", [34, 32, 34, 36, 29, 33, 33, 29, 32, 37]),
        (" 7", [216, 39]),
        ("3.14", [35, 30, 33, 36]),
        ("x10", [104, 33, 32]),
        ("Hello, world!", [19556, 28, 905, 17]),
        ("<|im_start|>42<|im_end|>", [1, 36, 34, 2]),
    ],
)
def test_the_tokenizer_takes_digits_one_by_one_as_the_published_one_does(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]
) -> None:
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_the_published_special_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert [index for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special] == [*range(17)]
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert tokenizer("2", add_special_tokens=True)["input_ids"] == [34]  # no token at the start


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe", "default"])
def test_a_gguf_file_with_another_split_is_refused_by_name(split: str) -> None:
    with pytest.raises(ModelError, match=f"splits text by '{split}'; expected 'smollm'"):
        pre_tokenizer(split)

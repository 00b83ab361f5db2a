"""--lora-alpha and --lora-dropout: what they compute, what is recorded, and how a run goes on with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.conftest import Filled
from tests.pipeline.training.test_lora import adapters, losses, train, weights
from tests.pipeline.training.test_ranks import call, on_ranks

from adpa.errors import OptionError
from adpa.pipeline.training.collapse import Watch
from adpa.pipeline.training.lora_settings import LoraSettings, lora_settings

DROPOUT: dict[str, Any] = {"lora_dropout": 0.5, "save_steps": 2}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["lora", "qlora"])
def dropped(request: pytest.FixtureRequest, few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dropped")
    train(few_words, output, load_in_4bit=request.param, **DROPOUT)
    return output


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(6.0, 1.5), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((None, 2.0), (2, 0.5), (0.5, 0.125)))],
)
def test_the_adapters_are_scaled_by_alpha_over_rank(
    alpha: float | None, scale: float, few_words: Filled, tmp_path: Path
) -> None:
    train(few_words, tmp_path, lora_alpha=alpha, max_steps=2)
    before, after = weights(few_words.models.student), weights(tmp_path)
    for name, (a, b) in adapters(tmp_path / "adapter").items():
        expected = before[name].double() + scale * b @ a
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "adpa.json").read_text())["lora"]["alpha"] == scale * 4
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == scale * 4


def test_a_whole_alpha_stays_a_whole_number_for_other_programs() -> None:
    settings = [lora_settings(4, None, False, alpha) for alpha in (None, 16.0, 1.5)]
    assert [repr(each.alpha) for each in settings if each] == ["8", "16", "1.5"]


def test_dropout_changes_training_and_nothing_else(dropped: Path, few_words: Filled, tmp_path: Path) -> None:
    in_4bit = json.loads((dropped / "adpa.json").read_text())["lora"]["load_in_4bit"]
    train(few_words, tmp_path, load_in_4bit=in_4bit)
    plain, with_dropout = (json.loads((output / "adpa.json").read_text()) for output in (tmp_path, dropped))
    assert with_dropout["student_before"] == pytest.approx(plain["student_before"], rel=1e-5)  # B is 0
    assert losses(dropped)[0] == pytest.approx(losses(tmp_path)[0], rel=1e-5)
    assert losses(dropped)[1:] != pytest.approx(losses(tmp_path)[1:], rel=1e-4)
    assert with_dropout["lora"]["dropout"] == 0.5
    before, after = weights(few_words.models.student), weights(dropped)
    for name, (a, b) in adapters(dropped / "adapter").items():  # the merged weights have no dropout
        torch.testing.assert_close(after[name].double(), before[name].double() + 2 * b @ a, rtol=1e-6, atol=1e-6)


def test_the_watch_measures_without_dropout(few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, pairs = Watch.measure, list[tuple[dict[str, float], dict[str, float]]]()

    def twice(self: Watch, model: Any) -> dict[str, float]:
        state = torch.get_rng_state()
        pairs.append((measure(self, model), measure(self, model)))
        assert torch.equal(torch.get_rng_state(), state)
        return dict(pairs[-1][1])  # Trainer adds to it

    monkeypatch.setattr(Watch, "measure", twice)
    train(few_words, tmp_path, lora_dropout=0.5)
    assert len(pairs) == 5
    for first, second in pairs:
        assert first == second


def test_a_resumed_run_draws_the_same_dropout(dropped: Path, few_words: Filled, tmp_path: Path) -> None:
    shutil.copy(dropped / "adpa.json", tmp_path)
    shutil.copytree(dropped / "checkpoint-2", tmp_path / "checkpoint-2")
    in_4bit = json.loads((dropped / "adpa.json").read_text())["lora"]["load_in_4bit"]
    train(few_words, tmp_path, load_in_4bit=in_4bit, **DROPOUT, resume_from_checkpoint="last")
    whole, resumed = (load_file(output / "adapter" / "adapter_model.safetensors") for output in (dropped, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.0}, r"its run has the lora \{'dropout': 0.5\}; this one has \{'dropout': 0.0\}"),
        ({"lora_dropout": 0.5, "lora_alpha": 3}, r"its run has the lora \{'alpha': 8\}; this one has \{'alpha': 3\}"),
    ],
)
def test_a_run_does_not_go_on_with_another_alpha_or_dropout(
    options: dict[str, Any], message: str, dropped: Path, few_words: Filled, tmp_path: Path
) -> None:
    in_4bit = json.loads((dropped / "adpa.json").read_text())["lora"]["load_in_4bit"]
    with pytest.raises(OptionError, match=message):
        train(
            few_words, tmp_path, load_in_4bit=in_4bit, **options, resume_from_checkpoint=str(dropped / "checkpoint-2")
        )


@pytest.mark.slow
def test_a_run_of_an_older_version_had_no_dropout(few_words: Filled, tmp_path: Path) -> None:
    train(few_words, tmp_path, save_steps=2)
    record = json.loads((tmp_path / "adpa.json").read_text())
    record["lora"].pop("dropout")
    (tmp_path / "adpa.json").write_text(json.dumps(record))
    with pytest.raises(OptionError, match=r"its run has the lora \{'dropout': 0.0\}; this one has \{'dropout': 0.1\}"):
        train(few_words, tmp_path, lora_dropout=0.1, save_steps=2, resume_from_checkpoint="last")
    train(few_words, tmp_path, save_steps=2, resume_from_checkpoint="last")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 0}, "--lora-alpha 0; expected more than 0"),
        ({"lora_alpha": -2.0}, "--lora-alpha -2; expected more than 0"),
        ({"lora_alpha": float("nan")}, "--lora-alpha nan; expected"),
        ({"lora_alpha": float("inf")}, "--lora-alpha inf; expected a finite number"),
        ({"lora_dropout": 1}, "--lora-dropout 1; expected at least 0 and less than 1"),
        ({"lora_dropout": -0.1}, r"--lora-dropout -0\.1; expected at least 0 and less than 1"),
        ({"lora_dropout": True}, "--lora-dropout True; expected a number"),
        ({"lora_rank": None, "lora_alpha": 16}, "--lora-alpha without --lora-rank; add a rank"),
        ({"lora_rank": None, "lora_dropout": 0.1}, "--lora-dropout without --lora-rank; add a rank"),
    ],
)
def test_numbers_out_of_range_and_without_a_rank_are_refused(
    options: dict[str, Any], message: str, few_words: Filled, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        train(few_words, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_defaults() -> None:
    assert lora_settings(4, None, False) == LoraSettings(4, 8, [], load_in_4bit=False, dropout=0.0)


@pytest.mark.slow
def test_every_rank_drops_other_numbers_and_a_resumed_run_the_same_ones(few_words: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {"objective": "dckd", "micro_batch_size": 2, "lora_rank": 2, "lora_dropout": 0.5}
    whole, resumed = (call(few_words, tmp_path / name, **options, save_steps=2) for name in ("whole", "resumed"))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    on_ranks(tmp_path, [whole, resumed | {"resume_from_checkpoint": str(checkpoint)}])
    states = [torch.load(path, weights_only=False)["cpu"] for path in sorted(checkpoint.glob("rng_state_*"))]
    assert len(states) == 2
    assert not torch.equal(*states)
    trained = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])

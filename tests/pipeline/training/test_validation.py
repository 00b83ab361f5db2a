"""Held-out examples: which they are, their losses against a dense oracle, and what they do not change."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Row
from tests.pipeline.conftest import Filled
from tests.pipeline.training.dense import dense_terms
from tests.pipeline.training.test_ranks import on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM

from adpa import DistillReport, distill, precompute
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.cache.selection import select
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import AdpaError
from adpa.pipeline.training.examples import divide_examples
from adpa.pipeline.training.inputs import find_needs
from adpa.pipeline.training.objectives import objective_terms
from adpa.pipeline.training.trainer import DistillTrainer
from adpa.pipeline.training.validation_settings import validation_settings

BRIEF: dict[str, Any] = {"batch_size": 2, "learning_rate": 1e-2, "logging_steps": 100, "warmup_steps": 0}


@pytest.fixture(scope="module")
def two(few_words: Filled, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """The cache of ``few_words``, and beside its eight pairs a second data set of five other ones."""
    folder = tmp_path_factory.mktemp("two")
    cache, data = folder / "cache", folder / "test.jsonl"
    shutil.copytree(few_words.cache, cache)
    rows = [json.dumps(row).replace("(", "1 (") for row in preference_rows[:5]]
    data.write_text("".join(f"{row}\n" for row in rows))
    models = few_words.models
    options: dict[str, Any] = {"teacher": str(models.teacher), "reference": str(models.reference), "top_k": 10}
    precompute(data=str(data), cache=cache, **options)
    precompute(data=str(data), cache=cache, **options, student=str(models.student), max_new_tokens=6)
    return Filled(cache, data, models)


def train(filled: Filled, output: Path, objective: Any = "dckd", **options: Any) -> DistillReport:
    return distill(objective, str(filled.models.student), filled.cache, output, **BRIEF | {"max_steps": 4} | options)


def record(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "adpa.json").read_text()))


def weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def sets_of(filled: Filled, data: Path) -> dict[str, ResponseSet]:
    sets = [one for one in read_response_sets(filled.cache) if one.record and one.record.data == str(data)]
    return {one.info.name: one for one in sets}


def dense_means(filled: Filled, model: Path, responses: ResponseSet, prompts: set[bytes] | None = None) -> list[float]:
    """NLL, KL and advantage term, each a mean over the response tokens of a set: one sequence at a time, in float64."""
    (scoring,) = read_scorings(filled.cache)
    signals = read_signals(filled.cache, scoring)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    rows = zip(responses.sequences(), signals.locate(responses.table["key"]), strict=True)
    for sequence, number in rows:
        if prompts is not None and sequence.prompt_ids.tobytes() not in prompts:
            continue
        with torch.no_grad():
            terms = dense_terms(student, sequence, signals.row(int(number)))
        sums += torch.stack(terms)
        tokens += len(sequence.response_ids)
    return (sums / tokens).tolist()


def expected_dckd(filled: Filled, model: Path, data: Path, prompts: set[bytes] | None = None) -> dict[str, float]:
    sets = sets_of(filled, data)
    nll, kl_chosen, _ = dense_means(filled, model, sets["chosen"], prompts)
    _, kl_rejected, _ = dense_means(filled, model, sets["rejected"], prompts)
    return {
        "eval_loss": nll + 0.7 * kl_chosen + 0.7 * kl_rejected,
        "eval_nll/chosen": nll,
        "eval_kl/chosen": kl_chosen,
        "eval_kl/rejected": kl_rejected,
    }


def expected_adpa(filled: Filled, model: Path, data: Path) -> dict[str, float]:
    sets = sets_of(filled, data)
    nll, kl_chosen, _ = dense_means(filled, model, sets["chosen"])
    _, kl_sampled, advantage = dense_means(filled, model, sets["sampled"])
    return {
        "eval_loss": nll + 0.4 * advantage,
        "eval_nll/chosen": nll,
        "eval_kl/chosen": kl_chosen,
        "eval_kl/sampled": kl_sampled,
        "eval_advantage/sampled": advantage,
    }


def test_the_losses_on_a_second_data_set_are_the_definitions(two: Filled, tmp_path: Path) -> None:
    """Of the student before training, at a step, and of the trained one; KL is measured without a KL term, too."""
    options: dict[str, Any] = {"eval_steps": 2, "set": ["eval_on_start=true", "per_device_eval_batch_size=2"]}
    report = train(two, tmp_path / "dckd", kl_weight=0.7, validation=str(two.data), **options)
    before, middle, last = record(tmp_path / "dckd")["held_out"]
    assert [each["step"] for each in (before, middle, last)] == [0, 2, 4]
    expected = expected_dckd(two, two.models.student, two.data)
    assert {key: before[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert report.validation == pytest.approx(expected_dckd(two, tmp_path / "dckd", two.data), rel=1e-5)
    assert report.validation == {key: last[key] for key in expected}
    adpa: dict[str, Any] = {"advantage_weight": 0.4, "plausibility": 0.0}
    report = train(two, tmp_path / "adpa", "adpa", validation=str(two.data), **adpa)
    assert report.validation == pytest.approx(expected_adpa(two, tmp_path / "adpa", two.data), rel=1e-5)
    assert (report.validation_examples, report.examples) == (5, 8)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["sequences", "prompts"])
def test_they_depend_neither_on_batches_nor_on_packing(packing: Any, two: Filled, tmp_path: Path) -> None:
    expected = expected_dckd(two, two.models.student, two.data)
    still: dict[str, Any] = {"kl_weight": 0.7, "max_steps": 1, "learning_rate": 1e-30, "packing": packing}
    for size in (1, 3, 8):
        chosen = [f"per_device_eval_batch_size={size}"]
        report = train(two, tmp_path / str(size), validation=str(two.data), set=chosen, **still)
        assert report.validation == pytest.approx(expected, rel=1e-5)


def test_evaluation_changes_no_bit_of_the_training(two: Filled, tmp_path: Path) -> None:
    """With dropout, whose random numbers are those of training alone."""
    student = shutil.copytree(two.models.student, tmp_path / "student")
    config = json.loads((student / "config.json").read_text()) | {"attention_dropout": 0.3}
    (student / "config.json").write_text(json.dumps(config))
    held_out = {one.id for one in sets_of(two, two.data).values()}
    others = [one for one in read_response_sets(two.cache) if one.id not in held_out and one.info.name != "sampled"]
    runs: dict[str, dict[str, Any]] = {
        "without": {"response_set": [one.shard_prefix() for one in others]},
        "with": {"validation": str(two.data), "eval_steps": 1, "set": ["eval_on_start=true"]},
    }
    for name, options in runs.items():
        distill("dckd", str(student), two.cache, tmp_path / name, **BRIEF, max_steps=4, **options)
    plain, evaluated = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(evaluated[name], plain[name]) for name in plain)
    assert len(record(tmp_path / "with")["held_out"]) == 5


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bytes]]:
    """The prompts that a run trains on, and those that it holds out."""
    prompts: dict[str, set[bytes]] = {}
    initialise = DistillTrainer.__init__

    def noted(self: DistillTrainer, **options: Any) -> None:
        prompts["trained"] = set(options["train_dataset"].prompts())
        prompts["held out"] = set(options["eval_dataset"].prompts())
        initialise(self, **options)

    monkeypatch.setattr(DistillTrainer, "__init__", noted)
    return prompts


def test_a_share_holds_out_whole_prompts(
    few_words: Filled, tmp_path: Path, seen: Mapping[str, set[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = train(few_words, tmp_path / "one", kl_weight=0.7, validation="0.3", seed=1)
    trained, held_out = seen["trained"], seen["held out"]
    assert (report.examples, report.validation_examples) == (len(trained), len(held_out)) == (5, 3)
    assert not trained & held_out
    assert "\n5 examples to train on, 3 held out\n" in capsys.readouterr().err
    expected = expected_dckd(few_words, tmp_path / "one", few_words.data, held_out)
    assert report.validation == pytest.approx(expected, rel=1e-5)
    assert record(tmp_path / "one")["validation"]["share"] == 0.3
    train(few_words, tmp_path / "two", "adpa", validation=0.3, seed=2)
    assert seen["held out"] == held_out, "another prompt is held out from another seed or objective"


def test_a_share_that_leaves_nothing_is_refused_with_one_that_does(few_words: Filled, tmp_path: Path) -> None:
    terms = objective_terms("dckd", None, None, 0)
    selection = select(few_words.cache, find_needs(terms), "")
    for share, message in {
        "0.001": r"--validation 0.001 holds out none of the 8 examples: .*; give (\S+) or more",
        "0.999": r"--validation 0.999 holds out all 8 examples: .*; give (\S+) or less",
    }.items():
        with pytest.raises(AdpaError, match=message) as caught:
            train(few_words, tmp_path / "out", validation=share)
        nearest = str(caught.value).split("give ")[1].split()[0]
        settings = validation_settings(nearest, None, None, False)
        divided = divide_examples(find_needs(terms), selection, None, settings)
        assert divided.held_out is not None
        assert len(divided.held_out) in (1, 7)


def refused(filled: Filled, output: Path, **options: Any) -> str:
    with pytest.raises(AdpaError) as caught:
        train(filled, output / "out", **options)
    return str(caught.value)


@pytest.mark.slow
def test_the_second_data_set_is_named_by_its_path_or_by_ids(
    two: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = {name: one.id for name, one in sets_of(two, two.data).items() if name != "sampled"}
    monkeypatch.chdir(two.data.parent)
    relative = tmp_path / "relative"
    train(two, relative, validation="test.jsonl", max_steps=1)
    train(two, tmp_path / "ids", validation=f" chosen-{ids['chosen'][:8]}, {ids['rejected']} ", max_steps=1)
    for name in ("relative", "ids"):
        assert record(tmp_path / name)["validation"]["responses"] == ids
        assert record(tmp_path / name)["held_out"][0]["eval_loss"] == record(relative)["held_out"][0]["eval_loss"]


def test_data_that_is_not_there_or_lacks_something_is_one_line(two: Filled, tmp_path: Path, few_words: Filled) -> None:
    said = refused(two, tmp_path, validation="tets.jsonl")
    assert said == (
        f"--validation tets.jsonl: the cache has no responses from this data; found {two.data}, {few_words.data}; "
        "run adpa precompute with --data tets.jsonl, or give a share of the data such as 0.02"
    )
    said = refused(few_words, tmp_path, validation=str(few_words.data))
    assert said.startswith(f"--validation {few_words.data}: all responses of the cache are from this data, and none ")
    trained_on = [one.shard_prefix() for one in sets_of(two, few_words.data).values() if one.info.name != "sampled"]
    assert refused(two, tmp_path, validation=str(few_words.data), response_set=trained_on) == (
        f"--validation {few_words.data}: the run trains on its chosen and rejected responses; name other data, or give "
        "a share of the data such as 0.02"
    )
    cache, other = shutil.copytree(two.cache, tmp_path / "cache"), tmp_path / "other.jsonl"
    other.write_text(two.data.read_text().replace("1 (", "2 ("))
    precompute(str(two.models.teacher), str(other), cache, top_k=5)
    lacking, (scoring,) = Filled(cache, other, two.models), read_scorings(two.cache)
    named: dict[str, Any] = {"validation": str(other), "scoring": scoring.id}
    named["response_set"] = [sets_of(two, few_words.data)["chosen"].shard_prefix()]
    command = (
        f"run adpa precompute --data {other} --cache {cache} --teacher {two.models.teacher} --top-k 10 "
        f"--reference {two.models.reference}"
    )
    assert refused(lacking, tmp_path, **named) == (
        f"--validation {other}: scoring {scoring.id} has 0 of 5 chosen responses; {command}"
    )
    assert refused(lacking, tmp_path, objective="adpa", **named) == (
        f"--validation {other}: the cache has no sampled responses of it of this student; {command} "
        f"--student {two.models.student}"
    )


@pytest.mark.slow
def test_prompts_that_are_trained_on_are_counted_or_refused(
    two: Filled, few_words: Filled, tmp_path: Path, preference_rows: list[Row]
) -> None:
    cache, mixed, same = (
        shutil.copytree(two.cache, tmp_path / "cache"),
        tmp_path / "mixed.jsonl",
        tmp_path / "same.jsonl",
    )
    rows = few_words.data.read_text().splitlines(keepends=True)
    mixed.write_text("".join(rows[:2]) + two.data.read_text())
    same.write_text("".join(rows[:3]))
    options: dict[str, Any] = {"reference": str(two.models.reference), "top_k": 10}
    for data in (mixed, same):
        precompute(str(two.models.teacher), str(data), cache, **options)
    filled = Filled(cache, mixed, two.models)
    trained_on = [one.shard_prefix() for one in sets_of(two, few_words.data).values() if one.info.name != "sampled"]
    report = train(filled, tmp_path / "out", validation=str(mixed), response_set=trained_on, max_steps=1)
    warning = f"--validation {mixed}: 2 of its 7 prompts are trained on, too; its loss says less about new prompts"
    assert warning in report.warnings
    said = refused(filled, tmp_path / "other", validation=str(same), response_set=trained_on)
    assert said == (
        f"--validation {same}: all its 3 prompts are trained on, too; name data with other prompts, or give a share "
        "such as 0.02"
    )


def test_training_stops_when_the_loss_on_held_out_examples_rises(two: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation": str(two.data), "max_steps": 12, "eval_steps": 2, "learning_rate": 3.0}
    options |= {"early_stopping_patience": 2, "lr_scheduler_type": "constant"}
    report = train(two, tmp_path / "last", **options)
    evaluations = {entry["step"]: entry["eval_loss"] for entry in record(tmp_path / "last")["held_out"]}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert (report.best_step, report.steps, report.stopped_early) == (best, best + 4, True)
    assert report.validation["eval_loss"] == evaluations[report.steps]
    assert record(tmp_path / "last")["losses"][-1]["step"] == report.steps, "its last loss is logged"
    kept = train(two, tmp_path / "best", load_best_model_at_end=True, **options)
    assert (kept.best_step, kept.validation["eval_loss"]) == (best, evaluations[best])
    assert [path.name for path in (tmp_path / "best").glob("checkpoint-*")] == [f"checkpoint-{best}"]
    saved = weights(tmp_path / "best")
    assert all(
        torch.equal(saved[name], tensor) for name, tensor in weights(tmp_path / "best" / f"checkpoint-{best}").items()
    )
    assert (record(tmp_path / "best")["best_step"], record(tmp_path / "best")["stopped_early"]) == (best, True)
    assert [record(tmp_path / name)["kept_step"] for name in ("last", "best")] == [report.steps, best]


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(two: Filled, tmp_path: Path) -> None:
    """Its evaluations and its patience go on; the held-out examples must be the same."""
    options: dict[str, Any] = {"validation": str(two.data), "max_steps": 12, "eval_steps": 2, "learning_rate": 3.0}
    options |= {"early_stopping_patience": 2, "lr_scheduler_type": "constant", "save_steps": 2}
    whole = train(two, tmp_path / "whole", **options)
    assert whole.stopped_early
    for step in (whole.steps - 2, whole.steps):
        folder = tmp_path / f"from-{step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "adpa.json", folder)
        resumed = train(two, folder, resume_from_checkpoint="last", **options)
        assert (resumed.steps, resumed.best_step, resumed.stopped_early) == (whole.steps, whole.best_step, True)
        ours, theirs = (record(tmp_path / name)["held_out"] for name in (f"from-{step}", "whole"))
        assert [(one["step"], one["eval_loss"]) for one in ours] == [(one["step"], one["eval_loss"]) for one in theirs]
        result, expected = weights(folder), weights(tmp_path / "whole")
        assert all(torch.equal(result[name], expected[name]) for name in expected)
    with pytest.raises(AdpaError, match=r"its run has the validation \{'share': None, 'responses': \{.*; this one has"):
        train(two, folder, resume_from_checkpoint="last", **options | {"validation": "0.3"})


@pytest.mark.slow
def test_the_best_adapters_are_merged(two: Filled, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation": str(two.data), "max_steps": 12, "eval_steps": 1, "learning_rate": 1.0}
    options |= {"lr_scheduler_type": "constant", "lora_rank": 4, "kl_weight": 0.7}
    options |= {"load_best_model_at_end": True, "early_stopping_patience": 1}
    report = train(two, tmp_path, **options)
    assert report.best_step is not None
    assert report.best_step < report.steps
    assert report.validation == pytest.approx(expected_dckd(two, tmp_path, two.data), rel=1e-4)


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_process_does(two: Filled, tmp_path: Path) -> None:
    """Five held-out examples, which two ranks cannot share evenly; with DDP and FSDP2; the best student is kept."""
    options: dict[str, Any] = {"objective": "dckd", "batch_size": 4, "micro_batch_size": 1, "learning_rate": 0.1}
    options |= {"validation": str(two.data), "eval_steps": 1, "load_best_model_at_end": True, "kl_weight": 0.7}
    options |= {"max_steps": 3, "device": "cpu", "lr_scheduler_type": "constant", "warmup_steps": 0}
    common = {"student": str(two.models.student), "cache": two.cache, **options}
    small = ["adam_epsilon=1", "per_device_eval_batch_size=2"]
    strategies = {"ddp": small, "fsdp2": [*small, "fsdp=true"]}
    said = on_ranks(tmp_path, [common | {"output": tmp_path / name, "set": own} for name, own in strategies.items()])
    assert said.count("8 examples to train on, 5 held out") == len(strategies), "said by one rank alone"
    distill(**common, output=tmp_path / "one", set=small)
    for name in strategies:
        ours, theirs = record(tmp_path / name), record(tmp_path / "one")
        keys = ("eval_loss", "eval_nll/chosen", "eval_kl/chosen", "eval_kl/rejected")
        for one, other in zip(ours["held_out"], theirs["held_out"], strict=True):
            assert [one[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-5)
        assert ours["best_step"] == theirs["best_step"] == 3
        expected = expected_dckd(two, tmp_path / name, two.data)
        assert ours["held_out"][-1]["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)

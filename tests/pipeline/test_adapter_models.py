"""Adapters as teacher, reference, student and baseline of the commands; beside whole weights they are refused."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from tests.pipeline.conftest import Filled, InstallVllm
from tests.pipeline.models.adapters import save_adapter
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from adpa import distill, evaluate, precompute
from adpa.cli import app
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import read_scorings, read_signals
from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.training.lora import load_base
from adpa.pipeline.training.lora_settings import LoraSettings

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


def merged(adapter: Path, to: Path) -> Path:
    """The whole checkpoint that PEFT and transformers alone make of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    base = config["base_model_name_or_path"]
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    )
    model.merge_and_unload().save_pretrained(to)
    for file in Path(base).glob("*token*"):
        shutil.copy(file, to)
    for file in Path(base).glob("chat_template*"):
        shutil.copy(file, to)
    return to


def rows_of(cache: Path, teacher: Path) -> dict[bytes, SignalRow]:
    (scoring,) = [each for each in read_scorings(cache) if each.teacher.name == str(teacher)]
    signals = read_signals(cache, scoring)
    numbers = signals.locate(pa.array(sorted(signals.keys()), pa.binary(16)))
    return {row.key: row for row in (signals.row(int(number)) for number in numbers)}


def test_signals_of_an_adapter_are_those_of_the_merged_checkpoint_and_of_no_other(
    few_words: Filled, tmp_path: Path
) -> None:
    base, cache = few_words.models.teacher, tmp_path / "cache"
    adapter, other = (save_adapter(base, tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2))
    whole = merged(adapter, tmp_path / "whole")
    common: dict[str, Any] = {"data": str(few_words.data), "cache": cache, "top_k": 10, "engine": "hf"}
    common["reference"] = str(base)
    for teacher in (adapter, other, whole):
        report = precompute(str(teacher), **common)
        assert (report.scored, report.reused) == (16, 0)
    again = precompute(str(adapter), **common)
    assert (again.scored, again.reused) == (0, 16)
    first, expected, others = (rows_of(cache, each) for each in (adapter, whole, other))
    assert first.keys() == expected.keys() == others.keys()
    assert len(first) == 16
    for key, row in first.items():
        np.testing.assert_array_equal(row.topk_ids, expected[key].topk_ids)
        np.testing.assert_array_equal(row.token_logprobs, expected[key].token_logprobs)
        assert np.abs(row.token_logprobs - others[key].token_logprobs).max() > 0.01


def test_another_adapter_in_the_same_place_is_scored_anew(few_words: Filled, tmp_path: Path) -> None:
    common: dict[str, Any] = {"data": str(few_words.data), "cache": tmp_path / "cache", "top_k": 5}
    for seed in (1, 2):
        adapter = save_adapter(few_words.models.teacher, tmp_path / "adapter", seed=seed)
        report = precompute(str(adapter), **common)
        assert (report.scored, report.reused) == (16, 0)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 60}))
    assert precompute(str(adapter), **common).scored == 16


def test_samples_of_an_adapter_are_those_of_the_merged_checkpoint(few_words: Filled, tmp_path: Path) -> None:
    adapter = save_adapter(few_words.models.student, tmp_path / "adapter")
    whole = merged(adapter, tmp_path / "whole")
    common: dict[str, Any] = {
        "teacher": str(few_words.models.teacher),
        "data": str(few_words.data),
        "max_new_tokens": 6,
    }
    sampled = []
    for student in (adapter, whole, few_words.models.student):
        cache = tmp_path / f"cache-{student.name}"
        assert precompute(**common, student=str(student), responses="sampled", cache=cache).sampled == 8
        (file,) = (cache / "responses").glob("sampled*.arrow")
        sampled.append(pa.ipc.open_file(file).read_all().column("response_ids").to_pylist())
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_adapter_is_evaluated_against_its_base(few_words: Filled, tmp_path: Path) -> None:
    models = few_words.models
    adapter = save_adapter(models.student, tmp_path / "adapter")
    common: dict[str, Any] = {"teacher": str(models.teacher), "reference": str(models.reference)}
    common |= {"data": str(few_words.data), "max_new_tokens": 6}
    one = evaluate(str(adapter), str(models.student), **common)
    other = evaluate(str(merged(adapter, tmp_path / "whole")), str(models.student), **common)
    assert one.student == other.student
    assert one.student != one.baseline


@pytest.mark.parametrize(
    ("lora_rank", "in_4bit"), [(None, False), (4, False), (4, True)], ids=["full", "lora", "qlora"]
)
def test_a_student_that_is_an_adapter_is_trained_as_the_merged_checkpoint(
    lora_rank: int | None, in_4bit: bool, few_words: Filled, tmp_path: Path
) -> None:
    adapter = save_adapter(few_words.models.student, tmp_path / "adapter")
    whole = merged(adapter, tmp_path / "whole")
    common: dict[str, Any] = {"cache": few_words.cache, "objective": "dckd", "batch_size": 4, "max_steps": 3}
    common |= {"learning_rate": 1e-2, "lora_rank": lora_rank, "load_in_4bit": in_4bit, "save_steps": 2}
    outputs = [tmp_path / "from-adapter", tmp_path / "from-whole"]
    for student, output in zip((adapter, whole), outputs, strict=True):
        distill(**common, student=str(student), output=output)
    result, expected = (load_file(output / "model.safetensors") for output in outputs)
    assert result.keys() == expected.keys()
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
    assert open_checkpoint(str(outputs[0])).adapter is None
    if lora_rank is None:
        assert not torch.equal(result["model.norm.weight"], load_file(whole / "model.safetensors")["model.norm.weight"])
        return
    # The new adapters name no base: on the student's base they would be another model. On the merged weights they work.
    config = json.loads((outputs[0] / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    with pytest.raises(ModelError, match="names no base"):
        open_checkpoint(str(outputs[0] / "adapter"))
    with pytest.raises(ModelError, match=f"an adapter whose base cannot be used: {adapter}: it is an adapter itself"):
        open_checkpoint(str(outputs[0] / "checkpoint-2"))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.mark.parametrize("fails", [False, True])
def test_merged_weights_for_qlora_are_removed_once_they_are_loaded(
    fails: bool, few_words: Filled, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(save_adapter(few_words.models.student, tmp_path / "adapter")))
    load, loaded = Checkpoint.load, []

    def load_and_record(self: Checkpoint, *arguments: Any, **options: Any) -> Any:
        loaded.append(self.directory)
        if fails and self.adapter is None:
            assert self.directory.is_dir()
            raise torch.OutOfMemoryError
        return load(self, *arguments, **options)

    monkeypatch.setattr(Checkpoint, "load", load_and_record)
    settings = LoraSettings(4, 8, (), load_in_4bit=True)
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        model = load_base(checkpoint, settings, "float32", "float32", torch.device("cpu"))
        assert model.name_or_path == str(checkpoint.adapter)
    assert [place.parent for place in loaded] == [few_words.models.student.parent, temporary]
    assert not list(temporary.iterdir())


def test_qlora_on_an_adapter_with_several_ranks_is_refused(
    few_words: Filled, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(save_adapter(few_words.models.student, tmp_path / "adapter")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = LoraSettings(4, 8, (), load_in_4bit=True)
    expected = (
        r"adapter, and with --load-in-4bit each of the 2 ranks would write its merged weights; merge it with PEFT"
    )
    with pytest.raises(ModelError, match=expected):
        load_base(checkpoint, settings, "float32", "float32", torch.device("cpu"))
    assert not list(temporary.iterdir())
    load_base(checkpoint, replace(settings, load_in_4bit=False), "float32", "float32", torch.device("cpu"))


def test_a_dry_run_with_vllm_merges_no_adapter(
    few_words: Filled, tmp_path: Path, temporary: Path, install_vllm: InstallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm("0.33.0+cpu")
    monkeypatch.setattr("adpa.pipeline.models.adapters.merge", None)
    teacher, reference, student = (
        str(save_adapter(base, tmp_path / f"adapter-{seed}", seed=seed))
        for seed, base in enumerate((few_words.models.teacher, few_words.models.teacher, few_words.models.student))
    )
    report = precompute(
        teacher,
        str(few_words.data),
        tmp_path / "cache",
        reference=reference,
        student=student,
        top_k=5,
        engine="vllm",
        device="cpu",
        dry_run=True,
    )
    assert (report.dry_run, report.engine) == (True, "vllm hidden-states")
    assert not list(temporary.iterdir())


def test_adapters_that_distill_wrote_are_a_model(few_words: Filled, tmp_path: Path) -> None:
    """Also those of a checkpoint in the middle."""
    output = tmp_path / "out"
    student = str(few_words.models.student)
    options: dict[str, Any] = {"objective": "dckd", "batch_size": 4, "max_steps": 2, "save_steps": 1, "lora_rank": 4}
    distill(cache=few_words.cache, output=output, student=student, learning_rate=1e-2, **options)
    expected = load_file(output / "model.safetensors")
    model = open_checkpoint(str(output / "adapter")).load("float32", torch.device("cpu"))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
    early = open_checkpoint(str(output / "checkpoint-1"))
    assert early.directory == few_words.models.student
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(output / "adapter"), dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["teacher", "reference", "student"])
def test_precompute_refuses_whole_weights_beside_an_adapter(
    option: str, few_words: Filled, tmp_path: Path, runner: CliRunner
) -> None:
    both = both_in_one(few_words.models.teacher, tmp_path)
    models = {"teacher": few_words.models.teacher} | {option: both}
    arguments = [part for name, path in models.items() for part in (f"--{name}", str(path))]
    cache = tmp_path / "cache"
    result = runner.invoke(app, ["precompute", *arguments, "--data", str(few_words.data), "--cache", str(cache)])
    problem = f"--{option} {both}: it has whole weights and an adapter (adapter_config.json)"
    expected = f"adpa: {problem}; merge it or remove it\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    assert not list(cache.rglob("*.arrow"))


@pytest.mark.parametrize("option", ["student", "baseline"])
def test_evaluate_and_distill_refuse_whole_weights_beside_an_adapter(
    option: str, few_words: Filled, tmp_path: Path
) -> None:
    both, models = str(both_in_one(few_words.models.teacher, tmp_path)), few_words.models
    compared: dict[str, Any] = {"student": str(models.student), "baseline": str(models.teacher)} | {option: both}
    with pytest.raises(ModelError, match="has whole weights and an adapter"):
        evaluate(**compared, teacher=str(models.teacher), reference=str(models.reference), data=str(few_words.data))
    with pytest.raises(ModelError, match="has whole weights and an adapter"):
        distill(cache=few_words.cache, objective="dckd", student=both, output=tmp_path / "out")


def both_in_one(base: Path, folder: Path) -> Path:
    """What a merge leaves behind that saves the whole weights beside the adapter."""
    both = folder / "both"
    shutil.copytree(base, both)
    for file in save_adapter(base, folder / "adapter").iterdir():
        shutil.copy(file, both)
    return both

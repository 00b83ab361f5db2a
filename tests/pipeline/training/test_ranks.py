"""Two ranks train as one process does, with DDP and with FSDP2; what happens when one is lost, or sees other files."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Row
from tests.pipeline.conftest import Filled, fill, set_ends
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from adpa import distill
from adpa.errors import OptionError

pytestmark = pytest.mark.slow

SMOOTH = ["adam_epsilon=1"]  # Adam as usual moves by the sign of a gradient, however small it is
STRATEGIES: dict[str, list[str]] = {"ddp": [], "fsdp2": ["fsdp=true"]}
# 7 examples, 4 a step: the second step of an epoch has 3, and a rank one less than the other.
STEPS: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": 4,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "device": "cpu",
}
ONE_STEP: dict[str, Any] = {"batch_size": 8, "max_steps": 1, "learning_rate": 10.0}
RUNS: dict[str, dict[str, Any]] = {
    "dckd": {"objective": "dckd", "micro_batch_size": 1},
    "adpa": {"objective": "adpa", "advantage_weight": 0.4, "micro_batch_size": 2},
    "packed": {"objective": "adpa", "micro_batch_size": 1, "packing": "prompts"},
    "lora": {"objective": "dckd", "micro_batch_size": 2, "lora_rank": 2},
}


@pytest.fixture(scope="module")
def seven(few_words: Filled, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A cache of seven examples, a number that two ranks cannot share evenly."""
    return fill(tmp_path_factory.mktemp("seven"), few_words.models, preference_rows[:7])


def start(folder: Path, calls: list[dict[str, Any]], ranks: int = 2) -> subprocess.Popen[str]:
    (folder / "calls.json").write_text(json.dumps(calls, default=str))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*torchrun, str(Path(__file__).with_name("rank.py")), str(folder / "calls.json")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def on_ranks(folder: Path, calls: list[dict[str, Any]], ranks: int = 2) -> str:
    process = start(folder, calls, ranks)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    return output


def call(filled: Filled, output: Path, **options: Any) -> dict[str, Any]:
    return {"student": str(filled.models.student), "cache": filled.cache, "output": output, **STEPS, **options}


def trained(output: Path) -> dict[str, Tensor]:
    return load_file(output / "model.safetensors")


def losses(output: Path) -> list[float]:
    return [log["loss"] for log in json.loads((output / "adpa.json").read_text())["losses"]]


def assert_same_training(result: Path, expected: Path, before: Path) -> None:
    """The same losses, and the same change of every parameter, up to 1e-5."""
    assert losses(result) == pytest.approx(losses(expected), rel=1e-5)
    was, is_, should = trained(before), trained(result), trained(expected)
    assert is_.keys() == should.keys()
    difference = sum(float((is_[name].double() - should[name].double()).square().sum()) for name in should)
    change = sum(float((should[name].double() - was[name].double()).square().sum()) for name in should)
    assert (difference / change) ** 0.5 < 1e-5


@pytest.fixture(scope="module")
def alone(seven: Filled, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """What one process makes of each run."""
    folder = tmp_path_factory.mktemp("alone")
    for run, options in RUNS.items():
        distill(**call(seven, folder / run, set=SMOOTH, **options))
    return {run: folder / run for run in RUNS}


@pytest.fixture(scope="module")
def together(seven: Filled, filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks make of them, by strategy and run."""
    folder = tmp_path_factory.mktemp("together")
    calls = [
        call(seven, folder / f"{name}-{run}", set=[*SMOOTH, *chosen], **options)
        for name, chosen in STRATEGIES.items()
        for run, options in RUNS.items()
    ]
    calls[0] |= {"save_steps": 2, "terminal": 0}
    student = shutil.copytree(seven.models.student, folder / "student-with-ends")
    set_ends(student, [2, 90])
    fsdp2 = {"objective": "dckd", "set": [*SMOOTH, "fsdp=true"]}
    calls.append(call(seven, folder / "fsdp2-saved", **fsdp2, save_steps=2))
    tied = call(filled, folder / "fsdp2-tied", **fsdp2 | ONE_STEP | {"micro_batch_size": 1})
    idle = call(seven, folder / "idle", objective="dckd", set=SMOOTH) | {"idle": True}
    for each in (idle, *calls):
        if each["objective"] == "adpa" or "idle" in each:
            each["student"] = str(student)
    output = on_ranks(folder, [idle, *calls, tied | {"count_gathers": folder / "gathers.json"}])
    (folder / "output.txt").write_text(output)
    return folder


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_process_does(
    strategy: str, run: str, together: Path, alone: Mapping[str, Path], seven: Filled
) -> None:
    assert_same_training(together / f"{strategy}-{run}", alone[run], seven.models.student)


@pytest.mark.parametrize("run", ["idle", "ddp-adpa", "ddp-packed", "fsdp2-adpa", "fsdp2-packed"])
def test_two_ranks_keep_every_id_that_ends_an_answer(run: str, together: Path) -> None:
    assert json.loads((together / run / "generation_config.json").read_text())["eos_token_id"] == [2, 90]


def test_ranks_do_not_look_for_parameters_without_a_gradient_where_there_are_none(together: Path) -> None:
    """Torch warns of a search that finds nothing."""
    assert "find_unused_parameters=True was specified" not in (together / "output.txt").read_text()


def test_a_parameter_without_a_gradient_is_no_obstacle(together: Path, alone: Mapping[str, Path]) -> None:
    assert losses(together / "idle") == pytest.approx(losses(alone["dckd"]), rel=1e-5)
    assert (trained(together / "idle")["idle"] == 0).all()


def test_tied_embeddings_that_ranks_share_are_gathered_once_a_step(
    together: Path, filled: Filled, tmp_path: Path
) -> None:
    """Four micro-batches, each with embeddings and head; the step before training watches the student with them too."""
    tied = together / "fsdp2-tied"
    distill(**call(filled, tmp_path / "alone", objective="dckd", set=SMOOTH, **ONE_STEP))
    assert_same_training(tied, tmp_path / "alone", filled.models.student)
    embeddings = trained(tied)["model.embed_tokens.weight"].numel()
    by_size = json.loads((together / "gathers.json").read_text())
    assert sum(times for size, times in by_size.items() if int(size) >= embeddings) <= 1
    assert sum(by_size.values()) > 4


def from_checkpoint(run: Path, folder: Path) -> Path:
    """A run that was stopped after its checkpoint."""
    folder.mkdir()
    shutil.copy(run / "adpa.json", folder)
    shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
    return folder


def test_a_run_of_two_ranks_goes_on_in_one_process(
    together: Path, alone: Mapping[str, Path], seven: Filled, tmp_path: Path
) -> None:
    output = from_checkpoint(together / "ddp-dckd", tmp_path / "out")
    going_on = {"objective": "dckd", "set": SMOOTH, "resume_from_checkpoint": "last"}
    distill(**call(seven, output, **going_on))
    assert_same_training(output, alone["dckd"], seven.models.student)


def test_a_sharded_run_goes_on_with_another_number_of_ranks(
    together: Path, alone: Mapping[str, Path], seven: Filled, tmp_path: Path
) -> None:
    output = from_checkpoint(together / "fsdp2-saved", tmp_path / "out")
    going_on = {"objective": "dckd", "set": [*SMOOTH, "fsdp=true"], "resume_from_checkpoint": "last"}
    on_ranks(tmp_path, [call(seven, output, **going_on)], ranks=1)
    assert_same_training(output, alone["dckd"], seven.models.student)


def test_when_a_rank_is_killed_the_others_stop_and_the_run_goes_on_from_its_checkpoint(
    seven: Filled, tmp_path: Path
) -> None:
    """In the end the two ranks have the same student, bit for bit, as if none had been killed."""
    options: dict[str, Any] = {"objective": "dckd", "micro_batch_size": 1, "save_steps": 1}
    before_the_second_half_of_step_3 = {"kill": [1, 5]}
    process = start(tmp_path, [call(seven, tmp_path / "killed", **options, **before_the_second_half_of_step_3)])
    children = psutil.Process(process.pid).children
    ranks: set[psutil.Process] = set()
    while process.poll() is None:
        ranks.update(children(recursive=True))
        time.sleep(0.05)
    assert process.returncode == 1
    assert len(ranks) >= 2
    assert not any(rank.is_running() for rank in ranks)
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    resumed = call(seven, tmp_path / "killed", **options, resume_from_checkpoint="last")
    on_ranks(tmp_path, [resumed, call(seven, tmp_path / "whole", **options)])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    killed, whole = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("other", ["another cache", "no cache"])
def test_ranks_that_see_different_caches_stop_at_once(
    other: str, seven: Filled, few_words: Filled, tmp_path: Path
) -> None:
    (tmp_path / "cache-0").symlink_to(seven.cache)
    if other == "another cache":
        (tmp_path / "cache-1").symlink_to(few_words.cache)
    student, output = str(seven.models.student), str(tmp_path / "out")
    options = ["--objective", "dckd", "--student", student, "--cache", "cache-{rank}", "--output", output]
    process = start(tmp_path, [{"command": ["distill", *options, "--device", "cpu"]}])
    text, _ = process.communicate(timeout=120)
    said = [line for line in text.splitlines() if line.startswith("adpa: ")]
    expected = "rank 1 has the responses" if other == "another cache" else "rank 1: cache-1: no cache there"
    assert said == [said[0]] * 2
    assert said[0].startswith(f"adpa: {expected}")
    assert not (tmp_path / "out").exists()


def test_ranks_with_a_student_that_cannot_be_padded_stop_before_they_train(seven: Filled, tmp_path: Path) -> None:
    options = ["--objective", "sft", "--student", str(seven.models.student), "--cache", str(seven.cache)]
    command = ["distill", *options, "--output", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "2"]
    process = start(tmp_path, [{"command": command, "count_columns": True}])
    text, _ = process.communicate(timeout=120)
    said = [line for line in text.splitlines() if line.startswith("adpa: ")]
    assert len(said) == 2
    assert all("LlamaForCausalLM cannot be trained: " in line for line in said)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_launched_command_speaks_once(seven: Filled, tmp_path: Path) -> None:
    options = ["--objective", "sft", "--student", str(seven.models.student), "--cache", str(seven.cache)]
    command = ["distill", *options, "--output", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "2"]
    process = start(tmp_path, [{"command": command}])
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert text.count("adpa distill") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fsdp=true"], "fsdp with ranks of the type NO, .*; expected a rank on each GPU; start it with torchrun"),
        (["fsdp=true", "fsdp_config={version: 1}"], "FSDP in version 1; adpa trains with FSDP2"),
        (["gradient_accumulation_steps=2"], "--micro-batch-size says how many fit"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    settings: list[str], message: str, seven: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # transformers leaves settings for accelerate there
    with pytest.raises(OptionError, match=message):
        distill(**call(seven, tmp_path / "out", objective="sft", set=settings))
    assert not (tmp_path / "out").exists()


ZERO_3 = "deepspeed={zero_optimization: {stage: 3}}"


def test_deepspeed_that_is_not_installed_is_named(
    seven: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"deepspeed": None, "transformers": find_spec("transformers")}
    monkeypatch.setattr("adpa.pipeline.training.overrides.find_spec", installed.get)
    with pytest.raises(OptionError, match="without DeepSpeed; pip install deepspeed"):
        distill(**call(seven, tmp_path / "out", objective="sft", set=[ZERO_3]))


def test_zero_3_that_could_not_write_its_student_is_refused(
    seven: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(OptionError, match="stage3_gather_16bit_weights_on_model_save is not true"):
        distill(**call(seven, tmp_path / "out", objective="sft", set=[ZERO_3]))
    unset_hf_deepspeed_config()  # for the tests after this one
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_deepspeed_train_as_one_process_does(
    stage: int, alone: Mapping[str, Path], seven: Filled, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": zero} | dict.fromkeys(sizes, "auto")))
    settings = {"set": [*SMOOTH, f"deepspeed={config}"]}
    calls = [call(seven, tmp_path / run, **options, **settings) for run, options in RUNS.items()]
    saving = {"objective": "dckd", "micro_batch_size": 1, "save_steps": 2}
    on_ranks(tmp_path, [*calls, call(seven, tmp_path / "saved", **saving, **settings)])
    for run in RUNS:
        assert_same_training(tmp_path / run, alone[run], seven.models.student)

    output = from_checkpoint(tmp_path / "saved", tmp_path / "resumed")
    on_ranks(tmp_path, [call(seven, output, **saving, **settings, resume_from_checkpoint="last")])
    assert_same_training(output, alone["dckd"], seven.models.student)

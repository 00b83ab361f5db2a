"""A run that is killed at any step, or while it saves, and then resumed, gives the same parameters bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Models, Row
from tests.pipeline.conftest import Filled, fill

from adpa import distill
from adpa.errors import OptionError
from adpa.pipeline.training.trainer import DistillTrainer

RUN: dict[str, Any] = {
    "objective": "adpa",
    "batch_size": 3,
    "micro_batch_size": 1,
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "logging_steps": 3,
}


class Killed(BaseException):
    """Nothing that anybody catches."""


@pytest.fixture(scope="module")
def seven(few_words: Filled, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A cache of seven examples, and a student with dropout, so that random numbers count."""
    folder = tmp_path_factory.mktemp("seven")
    student = shutil.copytree(few_words.models.student, folder / "student")
    settings = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.3}))
    models = Models(few_words.models.teacher, few_words.models.reference, student, student)
    return fill(folder, models, preference_rows[:7])


@pytest.fixture(scope="module")
def whole(seven: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never killed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(seven, output)
    return output


def train(seven: Filled, output: Path, resume: str | None = None, **options: Any) -> None:
    own: dict[str, Any] = {"student": str(seven.models.student), "cache": seven.cache, "output": output}
    distill(**own, resume_from_checkpoint=resume, **RUN | options)


def assert_same_student(output: Path, whole: Path) -> None:
    resumed, expected = load_file(output / "model.safetensors"), load_file(whole / "model.safetensors")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


SOON = (0, 9, 17)  # in the first step, between two checkpoints, in the last step; the others take minutes


@pytest.mark.parametrize(
    "micro_batch",
    [pytest.param(number, marks=() if number in SOON else pytest.mark.slow) for number in range(21)],
)
def test_killed_at_any_micro_batch(
    micro_batch: int, seven: Filled, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step, done = DistillTrainer.training_step, 0

    def step(self: DistillTrainer, *arguments: Any, **options: Any) -> Any:
        nonlocal done
        if done == micro_batch:
            raise Killed
        done += 1
        return training_step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", step)
        with pytest.raises(Killed):
            train(seven, tmp_path / "out")
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


@pytest.mark.parametrize("part", ["_save_optimizer_and_scheduler", "_save_rng_state", "save_student"])
def test_killed_while_it_saves(
    part: str, seven: Filled, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time; what was begun there is no checkpoint."""
    original, calls = getattr(DistillTrainer, part), 0

    def save(self: DistillTrainer, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or part == "save_student":
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, part, save)
        with pytest.raises(Killed):
            train(seven, tmp_path / "out")
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


def test_a_run_that_saves_because_trainer_was_told_so_goes_on_too(
    seven: Filled, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: DistillTrainer, output: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "save_student", killed)
        with pytest.raises(Killed):
            train(seven, tmp_path / "out", save_steps=0, set=["save_strategy=epoch"])
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


def test_a_finished_run_that_is_queued_again_does_no_further_step(seven: Filled, tmp_path: Path) -> None:
    """Here it ends within an epoch."""
    train(seven, tmp_path / "out", max_steps=5)
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    train(seven, tmp_path / "again", resume="last", max_steps=5)
    assert json.loads((tmp_path / "again" / "adpa.json").read_text())["steps"] == 5
    assert_same_student(tmp_path / "again", tmp_path / "out")


@pytest.mark.slow
def test_killed_by_a_signal(seven: Filled, whole: Path, tmp_path: Path) -> None:
    kill = """
import os, signal
from adpa.cli import main
from adpa.pipeline.training.trainer import DistillTrainer
save = DistillTrainer._save_rng_state
def killed(self, output_dir):
    if "checkpoint-4" in output_dir:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, output_dir)
DistillTrainer._save_rng_state = killed
main()
"""
    options = {**RUN, "student": seven.models.student, "cache": seven.cache, "output": tmp_path / "out"}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    killed = subprocess.run([sys.executable, "-c", kill, "distill", *words], capture_output=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


def test_last_begins_where_nothing_is_yet(seven: Filled, whole: Path, tmp_path: Path) -> None:
    """So a job that is queued again after every kill has the same command each time."""
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


@pytest.mark.parametrize("left", ["nothing", "an empty directory", "the record of a stopped run"])
def test_last_says_that_no_checkpoint_is_there(
    left: str, seven: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise Killed

    if left == "an empty directory":
        output.mkdir()
    if left == "the record of a stopped run":
        with monkeypatch.context() as patch:
            patch.setattr(DistillTrainer, "train", stop)
            with pytest.raises(Killed):
                train(seven, output, max_steps=2)
        assert [path.name for path in output.iterdir()] == ["adpa.json"]
    train(seven, output, resume="last", max_steps=2)
    line = f"--resume-from-checkpoint last: no checkpoint in {output}; the run begins at its first step"
    assert line in [record.getMessage() for record in caplog.records]
    assert line in json.loads((output / "adpa.json").read_text())["warnings"]


def test_a_named_checkpoint_must_be_whole(seven: Filled, whole: Path) -> None:
    (whole / "checkpoint-5").mkdir()
    with pytest.raises(OptionError, match=r"checkpoint-5: found no trainer_state\.json that can be read"):
        train(seven, whole, resume=str(whole / "checkpoint-5"))
    (whole / "checkpoint-5").rmdir()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 7}, "batch_size': 3}.*batch_size': 7}"),
        ({"seed": 1}, "seed': 0}.*seed': 1}"),
        ({"set": ["optim=sgd"]}, "optim': 'adamw_torch.*optim': 'sgd'}"),
        ({"set": ["neftune_noise_alpha=5"]}, "neftune_noise_alpha': None}.*neftune_noise_alpha': 5}"),
    ],
)
def test_a_run_goes_on_with_the_training_it_began_with(
    option: dict[str, Any], message: str, seven: Filled, whole: Path
) -> None:
    going_on = RUN | option | {"resume_from_checkpoint": "last"}
    with pytest.raises(OptionError, match=f"its run has the training .*{message}"):
        distill(student=str(seven.models.student), cache=seven.cache, output=whole, **going_on)


def test_a_finished_run_without_checkpoints_is_not_trained_again(seven: Filled, tmp_path: Path) -> None:
    once: dict[str, Any] = RUN | {"save_steps": 0, "student": str(seven.models.student), "cache": seven.cache}
    distill(**once, output=tmp_path / "out")
    with pytest.raises(OptionError, match="its run is finished, and kept no checkpoint; train anew in another"):
        distill(**once, output=tmp_path / "out", resume_from_checkpoint="last")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_without_its_optimizer_or_scheduler_is_none(
    name: str, seven: Filled, whole: Path, tmp_path: Path
) -> None:
    """Trainer would begin them anew and say nothing."""
    shutil.copytree(whole, tmp_path / "out")
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    (newest / name).unlink()
    with pytest.raises(OptionError, match=f"{newest}: found no {name} that can be read"):
        train(seven, tmp_path / "out", resume=str(newest))
    train(seven, tmp_path / "out", resume="last")
    assert_same_student(tmp_path / "out", whole)


def test_a_checkpoint_of_one_run_does_not_overwrite_another_run(seven: Filled, whole: Path, tmp_path: Path) -> None:
    train(seven, tmp_path / "out", objective="sft", max_steps=1)
    before = (tmp_path / "out" / "adpa.json").read_bytes()
    with pytest.raises(OptionError, match=r"not empty, and not the run of --resume-from-checkpoint .*checkpoint-4"):
        train(seven, tmp_path / "out", resume=str(whole / "checkpoint-4"))
    assert (tmp_path / "out" / "adpa.json").read_bytes() == before


def test_a_checkpoint_of_one_run_does_not_overwrite_what_is_no_run(seven: Filled, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"not empty, found notes\.txt and no adpa\.json of its run"):
        train(seven, tmp_path, resume=str(whole / "checkpoint-4"))

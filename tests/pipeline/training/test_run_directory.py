"""Where a run writes and what it resumes from, checked before torch is imported; two runs in one directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.commands import refusals
from tests.pipeline.conftest import Filled
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from adpa import distill
from adpa.errors import OptionError
from adpa.pipeline.training import run
from adpa.pipeline.training.run_directory import OPTIMIZER, SCHEDULER, STATE, check_output, claimed

DISTILL = "distill --objective dckd --student student --cache work/cache"
RESUME = f"{DISTILL} --output run --resume-from-checkpoint"
REFUSED = {
    f"{DISTILL} --output work/cache": "--output work/cache: lies in the cache work/cache; name a place outside of it",
    f"{DISTILL} --output work/cache/out": "--output work/cache/out: lies in the cache work/cache; "
    "name a place outside of it",
    f"{DISTILL} --output work": "--output work: holds the cache work/cache; name another directory",
    f"{DISTILL} --output student": "--output student: is the directory of the student student; name another directory",
    f"{DISTILL} --output full": "--output full: not empty, found notes.txt; name another directory",
    f"{DISTILL} --output run": "--output run: not empty, found adpa.json; "
    "name another directory, or resume with --resume-from-checkpoint last",
    f"{DISTILL} --output full --resume-from-checkpoint last": "--output full: not empty, found notes.txt and no "
    "adpa.json of its run; name another directory",
    f"{RESUME} nowhere": "--resume-from-checkpoint nowhere: no such directory; name a checkpoint, or last",
    f"{RESUME} latest": "--resume-from-checkpoint latest: no such directory; did you mean last?",
    f"{RESUME} run/checkpoint-7": "--resume-from-checkpoint run/checkpoint-7: no such directory; "
    "did you mean run/checkpoint-8?",
    f"{RESUME} full/notes.txt": "--resume-from-checkpoint full/notes.txt: is a file; name a checkpoint, or last",
    f"{RESUME} run": "--resume-from-checkpoint run: a run, not one of its checkpoints; "
    "go on with --output run --resume-from-checkpoint last",
    f"{RESUME} student": "--resume-from-checkpoint student: found no trainer_state.json that can be read; "
    "name a complete checkpoint, or last",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A student, a cache, a stopped run with one checkpoint, and a directory of something else."""
    for name in ("student", "work/cache", "run/checkpoint-8", "full"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "adpa.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-8" / STATE).write_text("{}")
    return tmp_path


def test_an_output_or_a_checkpoint_that_cannot_be_used_is_refused_before_torch_is_imported(folder: Path) -> None:
    assert refusals(REFUSED, folder) == [f"adpa: {line}\n" for line in REFUSED.values()]


def test_the_files_of_a_checkpoint_are_those_of_trainer() -> None:
    assert (STATE, OPTIMIZER, SCHEDULER) == (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)


@pytest.mark.parametrize("output", ["new", "student/out", "work/other"])
def test_a_new_directory_beside_the_others_is_fine(output: str, folder: Path) -> None:
    check_output(folder / output, None, folder / "work/cache", str(folder / "student"))


@pytest.mark.parametrize("resume", ["last", "checkpoint-8"])
def test_a_stopped_run_can_be_gone_on_with(resume: str, folder: Path) -> None:
    named = resume if resume == "last" else str(folder / "run" / resume)
    check_output(folder / "run", named, folder / "work/cache", str(folder / "student"))


def test_no_name_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"^--resume-from-checkpoint '': no such directory; name a "):
        check_output(folder / "new", "", folder / "work/cache", "student")


def test_the_record_of_a_run_is_untouched(folder: Path) -> None:
    check_output(folder / "run", "last", folder / "work/cache", "org/name")
    assert json.loads((folder / "run" / "adpa.json").read_text()) == {}


def test_a_directory_that_another_run_writes_to_is_refused_at_once_and_free_afterwards(folder: Path) -> None:
    (folder / "new").mkdir()
    with claimed(folder / "new"):
        for resume in (None, "last"):
            with pytest.raises(OptionError, match=r"new: another run writes to it now; name another directory$"):
                check_output(folder / "new", resume, folder / "work/cache", "org/name")
        check_output(folder / "other", None, folder / "work/cache", "org/name")
    check_output(folder / "new", None, folder / "work/cache", "org/name")
    assert list((folder / "new").iterdir()) == []


def train(few_words: Filled, output: Path, **options: Any) -> None:
    distill("kd", str(few_words.models.student), few_words.cache, output, max_steps=2, save_steps=1, **options)


def while_loading(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Does something once, while a run loads its student."""
    real = run.load_student

    def load(*arguments: Any) -> run.Student:
        monkeypatch.setattr(run, "load_student", real)
        do()
        return real(*arguments)

    monkeypatch.setattr(run, "load_student", load)


@pytest.mark.parametrize("first", [{}, {"dtype": "bfloat16"}])
def test_a_run_that_another_one_overtook_leaves_its_student_alone(
    first: dict[str, Any], few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    while_loading(monkeypatch, lambda: train(few_words, output, **first))
    with pytest.raises(OptionError, match=r"run: not empty, found adpa\.json; name another directory, or resume"):
        train(few_words, output)
    record = json.loads((output / "adpa.json").read_text())
    assert (record["steps"], record["training"]["dtype"]) == (2, first.get("dtype", "float32"))


def test_two_runs_that_resume_at_once_do_so_one_after_the_other(
    few_words: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    train(few_words, output)
    shutil.rmtree(output / "checkpoint-2")
    while_loading(monkeypatch, lambda: train(few_words, output, resume_from_checkpoint="last"))
    with pytest.raises(OptionError, match="run: another run has just written to it; "):
        train(few_words, output, resume_from_checkpoint="last")


def test_a_run_that_stopped_frees_its_directory(few_words: Filled, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path):
        raise KeyboardInterrupt
    train(few_words, tmp_path)

"""Where a run writes and what it resumes from, checked before torch is imported."""

import json
from pathlib import Path

import pytest
from tests.commands import refusals
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from adpa.errors import OptionError
from adpa.pipeline.training.run_directory import OPTIMIZER, SCHEDULER, STATE, check_output

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

"""What a study does on one seed: the laboratory, the students that its runs train, and a result file for each.

In the study's directory, ``seed-3/lab`` has the laboratory, ``seed-3/cache`` the teacher signals that the runs share,
``seed-3/students`` what they trained, and ``seed-3/results`` how good it is. A run whose result is there is not run
again; what a killed run left is removed.
"""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import logging as transformers_logging

from adpa.data.cache.files import write_file
from adpa.lab.checkpoints import Laboratory, Plan, build_laboratory
from adpa.lab.evaluate import Evaluation, evaluate
from adpa.lab.methods import Method, file_name, train
from adpa.lab.study import RESERVED
from adpa.pipeline.training.run_directory import RECORD


@dataclass(frozen=True)
class Run:
    """A student to train and evaluate, or without a method a checkpoint of the laboratory to evaluate.

    Attributes:
        name: unique in a study.
        method: how it is trained.
        start: name of the run that it begins with; default: the SFT student.
    """

    name: str
    method: Method | None
    start: str | None = None


STUDENT, TEACHER = (Run(name, None) for name in RESERVED)


@dataclass(frozen=True)
class Result:
    """How a run ended on one seed.

    Attributes:
        name: the run's.
        seed: the laboratory's.
        evaluation: the rewards of its responses to the held-out prompts.
        seconds: of training, and of scoring what no run before it needed.
        last_log: what ``distill`` logged last.
        version: of the adpa that did it.
    """

    name: str
    seed: int
    evaluation: Evaluation
    seconds: float
    last_log: dict[str, Any]
    version: str


def conduct_seed(directory: Path, seed: int, plan: Plan, prompts: int, runs: Sequence[Run]) -> None:
    """Does everything for one seed, on one core; what it prints goes to ``seed-<n>/log.txt``."""
    home = directory / f"seed-{seed}"
    home.mkdir(exist_ok=True)
    with (home / "log.txt").open("a") as log:  # all that libraries print, in a process that does nothing else
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)  # models this small gain nothing from a second, and lose much where cores are shared
    transformers_logging.set_verbosity_error()
    laboratory = _laboratory(home / "lab", seed, plan)
    asked = plan.environment.evaluation_prompts(prompts, seed)
    for run in runs:
        if not has_result(directory, seed, run):
            checkpoint, seconds = _train(run, laboratory, home, seed)
            evaluation = evaluate(checkpoint, asked, seed)
            record = checkpoint / RECORD
            logs = json.loads(record.read_text())["losses"] if record.exists() else [{}]
            result = {"evaluation": asdict(evaluation), "seconds": seconds, "last_log": logs[-1]}
            result["version"] = version("adpa")
            write_file(_result_path(directory, seed, run.name), json.dumps(result).encode())


def has_result(directory: Path, seed: int, run: Run) -> bool:
    """Whether a run is done."""
    return _result_path(directory, seed, run.name).exists()


def read_result(directory: Path, seed: int, run: Run) -> Result:
    """The result of a run that is done."""
    content = json.loads(_result_path(directory, seed, run.name).read_text())
    evaluation = Evaluation(**{decoding: tuple(rewards) for decoding, rewards in content.pop("evaluation").items()})
    return Result(run.name, seed, evaluation, **content)


def _result_path(directory: Path, seed: int, name: str) -> Path:
    return directory / f"seed-{seed}" / "results" / f"{file_name(name)}.json"


def _laboratory(directory: Path, seed: int, plan: Plan) -> Laboratory:
    if not directory.exists():
        begun = directory.with_name("lab.begun")
        shutil.rmtree(begun, ignore_errors=True)
        build_laboratory(begun, seed, plan)
        begun.rename(directory)
    return Laboratory(directory)


def _train(run: Run, laboratory: Laboratory, home: Path, seed: int) -> tuple[Path, float]:
    """The checkpoint of a run, and the seconds it took."""
    if run.method is None:
        return laboratory.teacher if run == TEACHER else laboratory.student, 0.0
    output = home / "students" / file_name(run.name)
    shutil.rmtree(output, ignore_errors=True)
    start = laboratory.student if run.start is None else home / "students" / file_name(run.start)
    started = time.perf_counter()
    train(run.method, laboratory, start, home / "cache", output, seed)
    return output, time.perf_counter() - started

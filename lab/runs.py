"""Runs a study on one seed: builds the laboratory, trains the students, and writes a result file for each.

For seed 3, the study's directory has the laboratory in ``seed-3/lab``, the teacher signals that all runs share in
``seed-3/cache``, the trained students in ``seed-3/students`` and their rewards in ``seed-3/results``. A run with a
result is not repeated. The files of a killed run are removed.
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

from adpa.data.cache.shards import write_file
from adpa.lab.checkpoints import Laboratory, Plan, build_laboratory
from adpa.lab.evaluate import Evaluation, evaluate
from adpa.lab.methods import Method, file_name, train
from adpa.lab.study import RESERVED
from adpa.pipeline.training.run_directory import RECORD


@dataclass(frozen=True)
class Run:
    """A student to train and evaluate, or a checkpoint of the laboratory to evaluate only.

    Attributes:
        name: unique in a study.
        method: the training method; None to evaluate only.
        start: name of the run whose student this one starts from; default: the SFT student.
    """

    name: str
    method: Method | None
    start: str | None = None


STUDENT, TEACHER = (Run(name, None) for name in RESERVED)


@dataclass(frozen=True)
class Result:
    """The result of a run on one seed.

    Attributes:
        name: the run's name.
        seed: the laboratory's seed.
        evaluation: the rewards of its responses to the held-out prompts.
        seconds: time of training, and of scoring sequences that no earlier run had scored.
        last_log: the last log of ``distill``.
        version: the version of adpa that ran it.
    """

    name: str
    seed: int
    evaluation: Evaluation
    seconds: float
    last_log: dict[str, Any]
    version: str


def conduct_seed(directory: Path, seed: int, plan: Plan, prompts: int, runs: Sequence[Run]) -> None:
    """Does all runs of one seed on one core. All output goes to ``seed-<n>/log.txt``."""
    home = directory / f"seed-{seed}"
    home.mkdir(exist_ok=True)
    with (home / "log.txt").open("a") as log:  # redirects the output of all libraries; this process does nothing else
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)  # a second thread does not speed up such small models, and slows them on shared cores
    transformers_logging.set_verbosity_error()
    laboratory = _laboratory(home / "lab", seed, plan)
    held_out_prompts = plan.environment.evaluation_prompts(prompts, seed)
    for run in runs:
        if not has_result(directory, seed, run):
            checkpoint, seconds = _train(run, laboratory, home, seed)
            evaluation = evaluate(checkpoint, held_out_prompts, seed)
            record = checkpoint / RECORD
            logs = json.loads(record.read_text())["losses"] if record.exists() else [{}]
            result = {"evaluation": asdict(evaluation), "seconds": seconds, "last_log": logs[-1]}
            result["version"] = version("adpa")
            write_file(_result_path(directory, seed, run.name), json.dumps(result).encode())


def has_result(directory: Path, seed: int, run: Run) -> bool:
    """Whether a run has a result."""
    return _result_path(directory, seed, run.name).exists()


def read_result(directory: Path, seed: int, run: Run) -> Result:
    """Reads the result of a finished run."""
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
    """The checkpoint of a run, and the seconds of its training."""
    if run.method is None:
        return laboratory.teacher if run == TEACHER else laboratory.student, 0.0
    output = home / "students" / file_name(run.name)
    shutil.rmtree(output, ignore_errors=True)
    start = laboratory.student if run.start is None else home / "students" / file_name(run.start)
    started = time.perf_counter()
    train(run.method, laboratory, start, home / "cache", output, seed)
    return output, time.perf_counter() - started

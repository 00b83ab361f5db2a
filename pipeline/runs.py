"""Lists the students below a directory: their settings, losses and evaluations. Imports no torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from adpa.errors import OptionError, did_you_mean
from adpa.pipeline.option_checks import check_choices, takes_options
from adpa.pipeline.options import Group
from adpa.pipeline.training.run_directory import RECORD, read_evaluations, read_record

Sort = Literal["path", "time"]


@dataclass(frozen=True)
class ListedRun:
    """A run of ``distill``.

    Attributes:
        path: its directory, relative to the listed one.
        finished: whether it is; another one is at work, or was stopped.
        time: when it finished, or was last written to, as ISO 8601 in UTC.
        student: the model before training: name, revision, digest.
        settings: its objective, weights, training and data by name, without those that it does not use.
        steps: optimizer steps.
        first_loss: loss at the first log.
        last_loss: loss at the last log.
        held_out_loss: loss on the held-out examples at the last evaluation in training.
        seconds: wall-clock time.
        warnings: warnings of the run.
        evaluations: the results of ``adpa evaluate``, each with its time, settings and report.
    """

    path: str
    finished: bool
    time: str
    student: dict[str, str | None]
    settings: dict[str, Any]
    steps: int | None
    first_loss: float | None
    last_loss: float | None
    held_out_loss: float | None
    seconds: float | None
    warnings: list[str]
    evaluations: list[dict[str, Any]]


@dataclass(frozen=True)
class RunsReport:
    """The result of ``list_runs``.

    Attributes:
        directory: the directory that was searched.
        runs: the runs in it and below it.
        broken: what is wrong with each run that cannot be read, by its path.
    """

    directory: str
    runs: list[ListedRun]
    broken: dict[str, str]


@takes_options
def list_runs(
    directory: Annotated[Path, Doc("Directory that holds the outputs of adpa distill, at any depth."), Group.DECIDE],
    sort: Annotated[Sort, Doc("Order: by path, or by time, the newest first."), Group.DATA] = "path",
) -> RunsReport:
    """List the students below a directory: settings, losses and evaluations.

    Runs that have not finished, and runs that cannot be read, are listed as such.

    Raises:
        OptionError: there is no such directory, or no run in it.
    """
    check_choices({"--sort": (sort, Sort)})
    if not directory.is_dir():
        if directory.exists():
            raise OptionError(f"{directory}: is a file", "name the directory that it lies in")
        near = did_you_mean(str(directory), [str(one) for one in directory.parent.glob("*") if one.is_dir()])
        raise OptionError(f"{directory}: no such directory", near or "check the path")
    runs: list[ListedRun] = []
    broken: dict[str, str] = {}

    def tell(error: OSError) -> None:
        broken[os.path.relpath(error.filename, directory)] = f"cannot be read: {error.strerror}"

    for folder, _, files in os.walk(directory, onerror=tell):
        if RECORD not in files:
            continue
        path = os.path.relpath(folder, directory)
        try:
            runs.append(_read_run(Path(folder), path))
        except OSError as error:
            broken[path] = f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            broken[path] = f"{RECORD} or what lies beside it is damaged: {' '.join(str(error).split())}"
    if not runs and not broken:
        raise OptionError(
            f"{directory}: found no {RECORD} in it or below it", "name a directory with outputs of adpa distill"
        )
    runs.sort(key=lambda run: run.path)
    if sort == "time":
        runs.sort(key=lambda run: run.time, reverse=True)
    return RunsReport(str(directory), runs, dict(sorted(broken.items())))


def _read_run(folder: Path, path: str) -> ListedRun:
    record = read_record(folder)
    losses, held_out = record.get("losses") or [], record.get("held_out") or []
    evaluated = [each["eval_loss"] for each in held_out if "eval_loss" in each]
    written = datetime.fromtimestamp((folder / RECORD).stat().st_mtime, UTC).isoformat(timespec="seconds")
    return ListedRun(
        path=path,
        finished="steps" in record,
        time=record.get("time", written),
        student=record["student"],
        settings=_settings(record),
        steps=record.get("steps"),
        first_loss=losses[0]["loss"] if losses else None,
        last_loss=losses[-1]["loss"] if losses else None,
        held_out_loss=evaluated[-1] if evaluated else None,
        seconds=record.get("seconds"),
        warnings=record.get("warnings", []),
        evaluations=read_evaluations(folder),
    )


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by name, in the order of a table."""
    training, terms = record["training"], record["terms"]
    by_term = {term: [name for name, weights in terms.items() if weights[term]] for term in ("kl", "advantage")}
    used: dict[str, Any] = {
        "objective": record["objective"],
        "on": " ".join(dict.fromkeys([*by_term["kl"], *by_term["advantage"]])),
        "α": max((terms[name]["kl"] for name in by_term["kl"]), default=None),
        "γ": max((terms[name]["advantage"] for name in by_term["advantage"]), default=None),
        "plausibility": record["plausibility"] if by_term["advantage"] else None,
        "LoRA": " ".join(f"{name} {_plain(value)}" for name, value in (record["lora"] or {}).items()),
        "rate": training["learning_rate"],
        "epochs": training["num_train_epochs"] if training["max_steps"] < 0 else None,
        "max steps": training["max_steps"] if training["max_steps"] > 0 else None,
        "batch": training["batch_size"],
        "schedule": training["lr_scheduler_type"],
        "warmup": training["warmup_steps"],
        "weight decay": training["weight_decay"],
        "clip": training["max_grad_norm"],
        "optimizer": training["optim"],
        "seed": training["seed"],
        "dtype": training["dtype"],
        "bf16": training["bf16"],
        "packing": record.get("packing"),
        "ranks": record.get("ranks"),
        "scoring": record["scoring"],
        "data": record.get("data"),
    }
    return {name: value for name, value in used.items() if value not in (None, "")}


def _plain(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)

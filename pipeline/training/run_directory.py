"""The directory of a training run: its record adpa.json, its checkpoints, and the one that a run resumes from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adpa.data.cache.files import write_file
from adpa.data.cache.locations import check_writable
from adpa.errors import OptionError

# What Trainer writes into a checkpoint; its own names are in a module that imports torch.
OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME = "optimizer.pt", "scheduler.pt", "trainer_state.json"
RECORD = "adpa.json"
LAST = "last"


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Writes adpa.json, which says how the student in this directory was made, or is being made."""
    write_file(output / RECORD, json.dumps(record, indent=2).encode() + b"\n")


def check_output(output: Path, resume_from_checkpoint: str | None) -> None:
    """Checks that a run can write to a directory, which must be empty unless the run resumes.

    Raises:
        OptionError: it cannot.
    """
    check_writable("--output", output)
    contents = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if contents and (resume_from_checkpoint is None or RECORD not in contents):
        raise OptionError(
            f"--output {output}: not empty, found {contents[0]}"
            + ("" if resume_from_checkpoint is None else f" and no {RECORD} of its run"),
            "name another directory, or resume with --resume-from-checkpoint last",
        )


def find_start(output: Path, resume_from_checkpoint: str | None, origin: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run resumes from; None if it begins at its first step.

    ``last`` is the newest complete checkpoint. A run that stopped before its first checkpoint begins anew.

    Args:
        output: the run's directory.
        resume_from_checkpoint: a checkpoint directory, or ``last``.
        origin: the run's objective, student, data and training, as in adpa.json.

    Raises:
        OptionError: no such checkpoint, or a checkpoint of another run.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != LAST:
        checkpoint = Path(resume_from_checkpoint)
        if missing := _missing_file(checkpoint, origin):
            raise OptionError(
                f"--resume-from-checkpoint {checkpoint}: found no {missing} that can be read",
                "name a complete checkpoint, or last",
            )
        if (output / RECORD).exists() and checkpoint.resolve().parent != output.resolve():
            raise OptionError(
                f"--output {output}: not empty, and not the run of --resume-from-checkpoint {checkpoint}",
                f"name {checkpoint.parent}, or another directory",
            )
        _check_origin(checkpoint.parent, resume_from_checkpoint, origin)
        return checkpoint
    if not output.exists() or not any(output.iterdir()):
        return None
    finished = "steps" in _check_origin(output, resume_from_checkpoint, origin)
    numbers = [path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")]
    steps = sorted((int(number) for number in numbers if number.isdigit()), reverse=True)
    checkpoints = (output / f"checkpoint-{step}" for step in steps)
    start = next((checkpoint for checkpoint in checkpoints if not _missing_file(checkpoint, origin)), None)
    if finished and start is None:
        raise OptionError(f"--output {output}: its run is finished", "start anew in another --output")
    return start


def _missing_file(checkpoint: Path, origin: Mapping[str, Any]) -> str:
    """A file that a checkpoint lacks, or an empty string.

    Trainer writes its state last. It resumes without the other files, but then the optimizer would start anew.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return TRAINER_STATE_NAME
    needed = () if origin["sharding"] else (OPTIMIZER_NAME, SCHEDULER_NAME)  # sharded, they have other names
    return next((name for name in needed if not (checkpoint / name).exists()), "")


def _check_origin(run: Path, resume_from_checkpoint: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a run resumes with its own objective, student, data and training; returns its record."""
    record: dict[str, Any]
    try:
        record = json.loads((run / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--resume-from-checkpoint {resume_from_checkpoint}: found no {RECORD} of its run in {run}",
            "name a checkpoint that adpa distill wrote, or start without it",
        ) from error
    for field, value in origin.items():
        before, now = record.get(field), value
        if isinstance(before, dict) and isinstance(now, dict):  # show only the difference; a student may have moved
            both = (key for key in before | now if (field, key) != ("student", "name"))
            keys = [key for key in both if before.get(key) != now.get(key)]
            before, now = ({key: side.get(key) for key in keys} for side in (before, now))
        if before != now:
            raise OptionError(
                f"--resume-from-checkpoint {resume_from_checkpoint}: its run has the {field} {before}; "
                f"this one has {now}",
                "resume with the same options, or start anew in another --output",
            )
    return record

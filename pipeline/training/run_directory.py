"""The directory of a training run: the record of what it is, its checkpoints, and going on from one of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from adpa.data.cache.files import write_file
from adpa.data.cache.locations import check_writable
from adpa.errors import OptionError

RECORD = "adpa.json"
LAST = "last"


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Writes how the student in a directory was made, or is being made."""
    write_file(output / RECORD, json.dumps(record, indent=2).encode() + b"\n")


def check_output(output: Path, resume_from_checkpoint: str | None) -> None:
    """Checks that a run can be written there: the directory must be empty unless the run goes on.

    Raises:
        OptionError: it cannot.
    """
    check_writable("--output", output)
    contents = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if contents and (resume_from_checkpoint is None or RECORD not in contents):
        raise OptionError(
            f"--output {output}: not empty, found {contents[0]}"
            + ("" if resume_from_checkpoint is None else f" and no {RECORD} of its run"),
            "name another directory, or go on with --resume-from-checkpoint last",
        )


def find_start(output: Path, resume_from_checkpoint: str | None, origin: Mapping[str, Any]) -> Path | None:
    """The checkpoint that a run goes on from; None where it begins at its first step.

    ``last`` is the newest checkpoint that was written to its end; a run that was stopped before it had one begins anew.

    Args:
        output: the run's directory.
        resume_from_checkpoint: a checkpoint directory, or ``last``.
        origin: what the run is: its objective, its student and its data.

    Raises:
        OptionError: there is no such checkpoint, or it is another run's.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != LAST:
        checkpoint = Path(resume_from_checkpoint)
        if lack := _lack(checkpoint, origin):
            raise OptionError(
                f"--resume-from-checkpoint {checkpoint}: found no {lack} that can be read",
                "name a checkpoint that was written to its end, or last",
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
    start = next((checkpoint for checkpoint in checkpoints if not _lack(checkpoint, origin)), None)
    if finished and start is None:
        raise OptionError(f"--output {output}: its run is finished", "start anew in another --output")
    return start


def _lack(checkpoint: Path, origin: Mapping[str, Any]) -> str:
    """The file that a checkpoint lacks, or none; Trainer writes its state last, and would do without the others."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return TRAINER_STATE_NAME
    needed = () if origin["sharding"] else (OPTIMIZER_NAME, SCHEDULER_NAME)  # sharded, they have other names
    return next((name for name in needed if not (checkpoint / name).exists()), "")


def _check_origin(run: Path, resume_from_checkpoint: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """A run goes on as it began: with its objective, student, data and training. Gives its record."""
    begun: dict[str, Any]
    try:
        begun = json.loads((run / RECORD).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--resume-from-checkpoint {resume_from_checkpoint}: found no {RECORD} of its run in {run}",
            "name a checkpoint that adpa distill wrote, or start without it",
        ) from error
    for field, value in origin.items():
        found, expected = begun.get(field), value
        if isinstance(found, dict) and isinstance(expected, dict):  # where they differ; a student may have moved
            both = (key for key in found | expected if (field, key) != ("student", "name"))
            keys = [key for key in both if found.get(key) != expected.get(key)]
            found, expected = ({key: side.get(key) for key in keys} for side in (found, expected))
        if found != expected:
            raise OptionError(
                f"--resume-from-checkpoint {resume_from_checkpoint}: its run has the {field} {found}; "
                f"this one has {expected}",
                "go on with the same options, or start anew in another --output",
            )
    return begun

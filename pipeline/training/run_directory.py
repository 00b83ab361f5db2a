"""The directory of a training run: its record adpa.json, its checkpoints, and the one that a run resumes from.

Imports no torch.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adpa.data.cache.files import write_file
from adpa.data.cache.locations import Location, check_outside, check_writable, is_local
from adpa.errors import OptionError, did_you_mean
from adpa.pipeline.models.launcher import this_rank

RECORD = "adpa.json"
EVALUATIONS = "evaluations.json"
CURVES = "curves.svg"
CARD = "README.md"
LAST = "last"
# What Trainer writes into a checkpoint; its own names are in a module that imports torch.
STATE, OPTIMIZER, SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"


def write_record(output: Path, record: Mapping[str, Any]) -> None:
    """Writes adpa.json, which says how the student in this directory was made, or is being made."""
    write_file(output / RECORD, json.dumps(record, indent=2).encode() + b"\n")


def read_record(run: Path) -> dict[str, Any]:
    """Reads adpa.json of a run.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no record.
    """
    record = _read_json(run / RECORD)
    if not isinstance(record, dict) or not {"objective", "terms", "student", "training"} <= record.keys():
        raise ValueError(f"{RECORD} is no record of a run")
    return record


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Reads evaluations.json of a run: the results of ``evaluate``; an empty list if there is none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no list of results.
    """
    if not (run / EVALUATIONS).exists():
        return []
    evaluations = _read_json(run / EVALUATIONS)
    if not isinstance(evaluations, list) or not all(
        isinstance(each, dict) and {"settings", "report", "time"} <= each.keys() for each in evaluations
    ):
        raise ValueError(f"{EVALUATIONS} is no list of evaluations")
    return evaluations


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON (line {error.lineno}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text in UTF-8") from error


def check_output(output: Path, resume_from_checkpoint: str | None, cache: Location, student: str) -> None:
    """Checks that a run can write to a directory, which must be empty unless the run resumes.

    Args:
        output: the directory.
        resume_from_checkpoint: see ``find_start``; here it only has to exist.
        cache: the cache that the run reads; the output may not lie in it, nor the other way around.
        student: the student that is trained, a directory or a name; its directory may not be the output, nor in it.

    Raises:
        OptionError: it cannot.
    """
    check_outside("--output", output, cache)
    place = output.resolve()
    for name, location in (("cache", cache), ("student", Path(student))):
        if is_local(location) and location.is_dir() and place in (location.resolve(), *location.resolve().parents):
            where = "is the directory of" if place == location.resolve() else "holds"
            raise OptionError(f"--output {output}: {where} the {name} {location}", "name another directory")
    check_writable("--output", output)
    if resume_from_checkpoint not in (None, LAST):
        _check_checkpoint(str(resume_from_checkpoint))
    if output.exists() and this_rank() == 0:
        with claimed(output):
            pass
    check_contents(output, resume_from_checkpoint)


def check_contents(output: Path, resume_from_checkpoint: str | None) -> None:
    """Checks that a directory is empty, or has the run that is resumed.

    Raises:
        OptionError: it is not.
    """
    contents = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if contents and (resume_from_checkpoint is None or RECORD not in contents):
        raise OptionError(
            f"--output {output}: not empty, found {RECORD if RECORD in contents else contents[0]}"
            + ("" if resume_from_checkpoint is None else f" and no {RECORD} of its run"),
            "name another directory" + (", or resume with --resume-from-checkpoint last" if RECORD in contents else ""),
        )


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keeps other runs on this machine out of a directory. The lock is no file: it ends with the process.

    Raises:
        OptionError: another run has the directory.
    """
    descriptor = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OptionError(f"--output {output}: another run writes to it now", "name another directory") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child process may have the descriptor, too
        os.close(descriptor)


def _check_checkpoint(name: str) -> None:
    checkpoint, option = Path(name), f"--resume-from-checkpoint {name or repr(name)}"
    if not (name and checkpoint.is_dir()):
        problem = "is a file" if checkpoint.is_file() else "no such directory"
        known = [LAST, *map(str, checkpoint.parent.glob("checkpoint-*"))]
        raise OptionError(f"{option}: {problem}", did_you_mean(name, known) or "name a checkpoint, or last")
    if (checkpoint / RECORD).exists():
        raise OptionError(
            f"{option}: a run, not one of its checkpoints",
            f"go on with --output {checkpoint} --resume-from-checkpoint {LAST}",
        )
    if missing := _missing_file(checkpoint, (STATE,)):
        raise OptionError(f"{option}: found no {missing} that can be read", "name a complete checkpoint, or last")


def earlier_ids(output: Path, resume_from_checkpoint: str | None) -> dict[str, Any]:
    """The scoring and the response sets of the run that is resumed, as in adpa.json; empty if none can be read.

    ``held out`` has the response sets that it is evaluated on, if they are those of a second data set.
    """
    if resume_from_checkpoint is None:
        return {}
    run = output if resume_from_checkpoint == LAST else Path(resume_from_checkpoint).parent
    try:
        record = read_record(run)
        held_out = (record.get("validation") or {}).get("responses")
        return {field: record[field] for field in ("scoring", "responses")} | {"held out": held_out}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # find_start says what is wrong
        return {}


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
    needed = (STATE,) if origin["sharding"] else (STATE, OPTIMIZER, SCHEDULER)  # sharded, they have other names
    if resume_from_checkpoint != LAST:
        checkpoint = Path(resume_from_checkpoint)
        if missing := _missing_file(checkpoint, needed):
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
    start = next((checkpoint for checkpoint in checkpoints if not _missing_file(checkpoint, needed)), None)
    if finished and start is None:
        raise OptionError(
            f"--output {output}: its run is finished, and kept no checkpoint", "train anew in another --output"
        )
    return start


def _missing_file(checkpoint: Path, needed: Sequence[str]) -> str:
    """The first of the needed files that a checkpoint lacks, or an empty string.

    Trainer writes its state last. It resumes without the other files, but then the optimizer would start anew.
    """
    try:
        json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError):
        return STATE
    return next((name for name in needed if not (checkpoint / name).exists()), "")


def _check_origin(run: Path, resume_from_checkpoint: str, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Checks that a run resumes with its own objective, student, data and training; returns its record."""
    try:
        record = read_record(run)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--resume-from-checkpoint {resume_from_checkpoint}: found no {RECORD} of its run in {run}",
            "name a checkpoint that adpa distill wrote, or start without it",
        ) from error
    for field, value in origin.items():
        before, now = record.get(field), value
        if field == "lora" and isinstance(before, dict):
            before = before | {"dropout": before.get("dropout", 0.0)}  # older records have none
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

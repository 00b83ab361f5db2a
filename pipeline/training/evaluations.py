"""The evaluations of a student, in evaluations.json of its directory. Imports no torch.

The file is no part of the model: its digest stays the same.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adpa.data.cache.files import write_file
from adpa.pipeline.training.model_card import write_card
from adpa.pipeline.training.run_directory import EVALUATIONS, RECORD, read_evaluations

logger = logging.getLogger(__name__)

# The options of ``evaluate`` that change no number, or that say where the student lies.
NO_SETTINGS = {
    "student", "show", "cache", "tensor_parallel", "gpu_memory_utilization", "batch_tokens", "device",
    "attn_implementation", "trust_remote_code",
}  # fmt: skip


def record_evaluation(student: str, options: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Keeps the result of ``evaluate`` beside the student, and writes its model card again.

    An earlier result with the same settings is replaced. Only a local student that ``distill`` trained has such a file.
    If it cannot be written, this says so in one line and does nothing more.

    Args:
        student: the student as the user named it.
        options: the options of ``evaluate`` by name.
        report: the fields of its report.
    """
    directory = Path(os.path.expanduser(student))
    if not (directory / RECORD).is_file():
        return
    settings = {name: _plain(value) for name, value in options.items() if name not in NO_SETTINGS}
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "settings": settings, "report": dict(report)}
    try:
        others = [each for each in read_evaluations(directory) if each["settings"] != settings]
        write_file(directory / EVALUATIONS, json.dumps([*others, entry], indent=2).encode() + b"\n")
        write_card(directory)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        logger.warning(f"{directory}: the evaluation is not kept there: {problem}")


def _plain(value: Any) -> Any:
    """An option as JSON has it; a place on this machine as an absolute path, so that it means the same anywhere."""
    if isinstance(value, str | os.PathLike) and os.path.exists(value):
        return str(Path(value).absolute())
    return json.loads(json.dumps(value, default=str))

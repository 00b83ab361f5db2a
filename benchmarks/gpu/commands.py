"""Part g of the GPU benchmark: times README's four commands with default options, from text pairs to a student."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.models import MEDIUM, SMALL, checkpoint, limits, preferences
from benchmarks.gpu.part import Figure, Measure, Setting

from adpa.pipeline.distill import distill
from adpa.pipeline.precompute import precompute

PAIRS, NEW_TOKENS = 96, 64
DRY_PAIRS, DRY_NEW_TOKENS = 4, 4


def four_commands(setting: Setting) -> list[Measure]:
    """The measures of part g."""
    return [Measure("the four commands", 40, partial(workflow, setting))]


def workflow(setting: Setting) -> Iterator[Figure]:
    """Runs the commands one after the other and yields the seconds of each."""
    teacher, reference, student = (
        str(checkpoint(setting, size, seed)) for size, seed in ((MEDIUM, 0), (MEDIUM, 1), (SMALL, 0))
    )
    data: dict[str, Any] = {"data": str(preferences(setting, DRY_PAIRS if setting.dry else PAIRS)), **limits(setting)}
    new_tokens = DRY_NEW_TOKENS if setting.dry else NEW_TOKENS
    cache, dckd, adpa_plus = (setting.folder / "workflow" / name for name in ("cache", "dckd", "adpa-plus"))
    commands: dict[str, Callable[[], object]] = {
        "precompute chosen and rejected": lambda: precompute(teacher=teacher, cache=cache, **data),
        "distill dckd": lambda: distill("dckd", student, cache, dckd),
        "precompute the student's own responses": lambda: precompute(
            teacher=teacher,
            reference=reference,
            student=str(dckd),
            cache=cache,
            max_new_tokens=new_tokens,
            **data,
        ),
        "distill adpa": lambda: distill("adpa", str(dckd), cache, adpa_plus),
    }
    for name, command in commands.items():
        started = time.perf_counter()
        command()
        yield Figure(name, time.perf_counter() - started, "s")

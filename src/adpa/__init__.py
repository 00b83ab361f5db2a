"""Advantage-guided distillation for preference alignment of small language models.

The rooms of the house, in the order in which data flows through them:

    adpa.data       preference pairs to token sequences; response sets, signals and batches in files
    adpa.pipeline   models: scoring and sampling (stage one), training (stage two), evaluation
    adpa.kernels    tensors only: the student's losses, the teacher's rows
    adpa.cli        the command line
    adpa.lab        a laboratory with a programmatic preference; the demo
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adpa.pipeline.distill import DistillReport, distill
    from adpa.pipeline.evaluate import EvaluateReport, evaluate
    from adpa.pipeline.inspect import InspectReport, inspect_cache
    from adpa.pipeline.precompute import PrecomputeReport, precompute

__all__ = [
    "DistillReport",
    "EvaluateReport",
    "InspectReport",
    "PrecomputeReport",
    "distill",
    "evaluate",
    "inspect_cache",
    "precompute",
]


def __getattr__(name: str) -> Any:
    """A stage, imported when it is asked for: ``adpa.kernels`` needs torch alone, not what reads data and models."""
    if name not in __all__:
        raise AttributeError(f"module 'adpa' has no attribute {name!r}")
    stage = name.lower().removesuffix("report").removesuffix("_cache")
    return getattr(import_module(f"adpa.pipeline.{stage}"), name)

"""Advantage-guided distillation for preference alignment of small language models.

The rooms, in the order in which data flows through them:

    adpa.data               preference pairs to token sequences; batches; statistics
    adpa.data.cache         the files of a cache: response sets, samples, scorings and their signals
    adpa.pipeline           one module for each command
    adpa.pipeline.models    checkpoints, heads, attention: for both stages
    adpa.pipeline.scoring   stage one: engines, scoring, sampling
    adpa.pipeline.training  stage two: objectives, student, trainer
    adpa.pipeline.cache     the commands on a whole cache
    adpa.pipeline.terminal  how reports look
    adpa.kernels            tensors only: the student's losses, the teacher's rows
    adpa.cli                the command line
    adpa.lab                a laboratory with a programmatic preference; the demo
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adpa.pipeline.cache.export import ExportReport, export_cache
    from adpa.pipeline.cache.gc import GarbageReport, collect_garbage
    from adpa.pipeline.cache.ls import CacheListing, list_cache
    from adpa.pipeline.cache.merge import MergeReport, merge_cache
    from adpa.pipeline.cache.pack import PackReport, pack_cache
    from adpa.pipeline.cache.verify import VerifyReport, verify_cache
    from adpa.pipeline.distill import DistillReport, distill
    from adpa.pipeline.evaluate import EvaluateReport, evaluate
    from adpa.pipeline.inspect import InspectReport, inspect_cache
    from adpa.pipeline.precompute import PrecomputeReport, precompute
    from adpa.pipeline.runs import RunsReport, list_runs

# In which module of adpa.pipeline a stage and its report are.
STAGES = {
    "cache.export": ("ExportReport", "export_cache"),
    "cache.gc": ("GarbageReport", "collect_garbage"),
    "cache.ls": ("CacheListing", "list_cache"),
    "cache.merge": ("MergeReport", "merge_cache"),
    "cache.pack": ("PackReport", "pack_cache"),
    "cache.verify": ("VerifyReport", "verify_cache"),
    "distill": ("DistillReport", "distill"),
    "evaluate": ("EvaluateReport", "evaluate"),
    "inspect": ("InspectReport", "inspect_cache"),
    "precompute": ("PrecomputeReport", "precompute"),
    "runs": ("RunsReport", "list_runs"),
}

__all__ = [
    "CacheListing",
    "DistillReport",
    "EvaluateReport",
    "ExportReport",
    "GarbageReport",
    "InspectReport",
    "MergeReport",
    "PackReport",
    "PrecomputeReport",
    "RunsReport",
    "VerifyReport",
    "collect_garbage",
    "distill",
    "evaluate",
    "export_cache",
    "inspect_cache",
    "list_cache",
    "list_runs",
    "merge_cache",
    "pack_cache",
    "precompute",
    "verify_cache",
]


# Where bitsandbytes is installed, transformers imports it with Trainer, and on some CPUs every command would warn that
# a kernel for inference is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """A stage, imported when it is asked for: ``adpa.kernels`` needs torch alone, not what reads data and models."""
    for module, names in STAGES.items():
        if name in names:
            return getattr(import_module(f"adpa.pipeline.{module}"), name)
    raise AttributeError(f"module 'adpa' has no attribute {name!r}")

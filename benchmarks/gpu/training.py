"""Part e of the GPU benchmark: the speed of DCKD steps of a small student, with different settings.

Each setting is a run of ``adpa.distill`` with a few steps. Its speed counts the steps after the first, in tokens
without padding. The settings run one after the other, and the first one again at the end: the difference of its two
speeds is noise.

Shapes: N response rows, V vocabulary, d hidden width, K ids.
"""

import json
import shutil
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args
from unittest import mock
from warnings import WarningMessage, catch_warnings, simplefilter

import torch
from benchmarks.cost_model import Assumptions, Pairs, needed_flops
from benchmarks.costs import measure_pairs
from benchmarks.gpu.measures import figure_of
from benchmarks.gpu.models import SMALL, TEACHER, checkpoint, encoded_pairs, limits, preferences, shape_of
from benchmarks.gpu.part import Figure, Measure, Setting
from benchmarks.gpu.trace import mask_cost, profiled_steps
from torch import Tensor

from adpa.data.sequences import Packing
from adpa.kernels.head import HeadLosses
from adpa.pipeline.distill import distill
from adpa.pipeline.precompute import precompute
from adpa.pipeline.training import student

PAIRS, BATCH, MICRO_BATCH, STEPS = 192, 32, 4, 6  # batch and micro-batch are the defaults of distill
DRY_PAIRS, DRY_BATCH, DRY_MICRO_BATCH, DRY_STEPS = 4, 4, 2, 2
AS_IT_IS, AGAIN, FLOAT32, EAGER = "as it is", "as it is, again", "float32", "eager losses"
PACKING = "packing sequences"
NO_WORKERS, TWO_WORKERS = "no loader workers", "two loader workers"
WITHOUT = ["dataloader_num_workers=0", "dataloader_persistent_workers=false"]
WITH = ["dataloader_num_workers=2", "dataloader_persistent_workers=false"]


def training(setting: Setting) -> list[Measure]:
    """The measures of part e."""
    runs = Runs(setting)
    no_gpu = "it needs a GPU" if setting.dry else None
    packings = [f"packing {way}" for way in get_args(Packing) if way != "none"]
    return [
        Measure(AS_IT_IS, 20, partial(runs.measure, AS_IT_IS)),
        Measure(FLOAT32, 15, partial(runs.measure, FLOAT32, (AS_IT_IS, FLOAT32), bf16=False)),
        *(
            Measure(name, 8, partial(runs.measure, name, (name, AS_IT_IS), packing=name.removeprefix("packing ")))
            for name in packings
        ),
        Measure("FLOP/s", 0, runs.flops),
        Measure(EAGER, 8, runs.with_eager_losses),
        Measure("host waits", 12, runs.host_waits, no_gpu),
        Measure("idle share", 12, runs.idle_share),
        Measure("attention with a mask", 4, runs.mask),
        Measure(NO_WORKERS, 8, partial(runs.measure, NO_WORKERS, set=WITHOUT)),
        Measure(TWO_WORKERS, 8, partial(runs.measure, TWO_WORKERS, (TWO_WORKERS, NO_WORKERS), set=WITH)),
        Measure(AGAIN, 8, partial(runs.measure, AGAIN, (AGAIN, AS_IT_IS))),
    ]


@dataclass
class Runs:
    """Runs of ``adpa.distill``, and the speed of each in tokens per second."""

    setting: Setting
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return DRY_BATCH // DRY_MICRO_BATCH if self.setting.dry else BATCH // MICRO_BATCH

    def distill(self, **options: Any) -> list[dict[str, Any]]:
        """Trains a student for a few steps and returns the logs."""
        dry, output = self.setting.dry, self.setting.folder / "run"
        defaults: dict[str, Any] = {
            "objective": "dckd",
            "student": str(checkpoint(self.setting, SMALL)),
            "cache": self.cache,
            "output": output,
            "batch_size": DRY_BATCH if dry else BATCH,
            "micro_batch_size": DRY_MICRO_BATCH if dry else MICRO_BATCH,
            "max_steps": DRY_STEPS if dry else STEPS,
            "logging_steps": 1,
        }
        shutil.rmtree(output, ignore_errors=True)
        distill(**defaults | options)
        logs: list[dict[str, Any]] = json.loads((output / "adpa.json").read_text())["losses"]
        shutil.rmtree(output)
        return logs

    @cached_property
    def cache(self) -> Path:
        """A cache with the signals of a small teacher, made once."""
        cache = self.setting.folder / "training-cache"
        precompute(
            teacher=str(checkpoint(self.setting, TEACHER)),
            data=str(preferences(self.setting, self.pairs)),
            cache=cache,
            engine="hf",
            **limits(self.setting),
        )
        return cache

    @property
    def pairs(self) -> int:
        """Number of training pairs."""
        return DRY_PAIRS if self.setting.dry else PAIRS

    def measure(self, name: str, compared: tuple[str, str] | None = None, **options: Any) -> Iterator[Figure]:
        """Speed and peak memory of one setting, and the ratio of two settings' speeds."""
        on_gpu = self.setting.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _, *logs = self.distill(**options)
        speeds = [log["tokens_per_second"] for log in logs]
        self.speeds[name] = statistics.median(speeds)
        yield figure_of(name, speeds, "tokens/s")
        if on_gpu:
            yield Figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        one, other = compared or (name, name)
        if one != other and one in self.speeds and other in self.speeds:
            yield Figure(f"{one} / {other}, speed", self.speeds[one] / self.speeds[other])

    def with_eager_losses(self) -> Iterator[Figure]:
        """Trains the student with plain losses instead of the loss head."""
        with mock.patch.object(student, "distill_head", eager_losses):
            yield from self.measure(EAGER, (AS_IT_IS, EAGER))

    def host_waits(self) -> Iterator[Figure]:
        """The host's waits for the GPU in a micro-batch: the waits that two more steps add."""

        def waits(steps: int) -> list[WarningMessage]:
            with catch_warnings(record=True) as caught:
                simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    self.distill(max_steps=steps, logging_steps=1000)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            return [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]

        places = added(waits(2), waits(4))
        count = places.total() / (2 * self.micro_batches)
        note = ", ".join(f"{place} × {number}" for place, number in places.most_common(5))
        yield Figure("host waits a micro-batch", count, note=note)

    def idle_share(self) -> Iterator[Figure]:
        """The share of the time after the first step in which the GPU is idle. The profiler slows the host down."""
        steps = DRY_STEPS if self.setting.dry else 3
        with profiled_steps(self.setting, steps) as profile:
            self.distill(max_steps=steps, logging_steps=1000)
        note = f"of {profile.wall:.2f} s, which a profiler lengthens; {profile.operations:,} kernels and copies"
        yield Figure("GPU idle", profile.idle, note=note)

    def mask(self) -> Iterator[Figure]:
        """The time that a boolean mask would add to a padded micro-batch, and the time of a new shape with cuDNN."""
        figures = list(mask_cost(self.setting, shape_of(self.setting, SMALL)))
        yield from figures
        if AS_IT_IS in self.speeds:
            layers = shape_of(self.setting, SMALL).layers
            micro_batch = MICRO_BATCH * self.tokens_of_a_pair / self.speeds[AS_IT_IS]
            yield Figure("boolean mask / micro-batch, time", layers * figures[0].value / 1e3 / micro_batch)

    @cached_property
    def lengths(self) -> Pairs:
        """The lengths of the pairs."""
        return measure_pairs(encoded_pairs(self.setting, self.pairs))

    @property
    def tokens_of_a_pair(self) -> float:
        """Mean tokens of both sequences of a pair, each with the prompt."""
        return sum(float(responses.whole.mean()) for responses in self.lengths.responses())

    def flops(self) -> Iterator[Figure]:
        """FLOP/s of the setting that computes every sequence and no padding."""
        if PACKING in self.speeds:
            flops = needed_flops(shape_of(self.setting, SMALL), self.lengths.responses(), Assumptions(batch=1))
            rate = flops / self.tokens_of_a_pair * self.speeds[PACKING]
            yield Figure("training, FLOP/s", rate / 1e12, "TFLOP/s", note="packing sequences: no padding is computed")


def added(few: Sequence[WarningMessage], many: Sequence[WarningMessage]) -> Counter[str]:
    """Counts, by source line, the warnings that a longer run has in addition to a shorter one."""

    def places(warnings: Sequence[WarningMessage]) -> Counter[str]:
        return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in warnings)

    return places(many) - places(few)


def eager_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor,
    advantages: Tensor,
    nll_weight: Tensor,
    kl_weight: Tensor,
    advantage_weight: Tensor,
    **_: Any,
) -> tuple[Tensor, HeadLosses]:
    """Replaces ``distill_head`` by plain torch: all logits at once, the tail as 1 − Σq."""
    padding_NK = topk_ids < 0
    logq_NV = (hidden @ weight.T).float().log_softmax(1)
    logq_NK = logq_NV.gather(1, topk_ids.clamp(min=0).long())
    q_NK = logq_NK.exp().masked_fill(padding_NK, 0)
    logp_NK = teacher_logprobs.masked_fill(padding_NK, 0)
    p_NK, p_N = logp_NK.exp().masked_fill(padding_NK, 0), tail_logprob.exp()
    tail_N = torch.log1p(-q_NK.sum(1).clamp(max=1 - 1e-6))
    nll_N = -logq_NV.gather(1, labels[:, None]).squeeze(1)
    kl_N = (p_NK * (logp_NK - logq_NK)).sum(1) + p_N * (tail_logprob.clamp(min=-100) - tail_N)
    advantage_N = -(q_NK * advantages.masked_fill(padding_NK, 0)).sum(1)
    loss = (nll_weight * nll_N + kl_weight * kl_N + advantage_weight * advantage_N).sum()
    return loss, HeadLosses(nll_N.detach(), kl_N.detach(), advantage_N.detach())

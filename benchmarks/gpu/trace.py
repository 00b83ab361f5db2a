"""Measures of single GPU kernels for part e of the GPU benchmark: idle time, and the time of an attention mask.

Shapes: B sequences, H heads, L tokens, E width of a head.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.cost_model import Shape
from benchmarks.gpu.measures import figure_of, in_turns, seconds
from benchmarks.gpu.part import Figure, Setting
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_WORK = ("cpu_op",)  # used in a dry run
NEW_SHAPES = 16


@dataclass
class Profile:
    """Results of a profiler: wall-clock seconds, the idle share of them, and the number of operations."""

    wall: float = 0.0
    idle: float = 0.0
    operations: int = 0


@contextmanager
def profiled_steps(setting: Setting, steps: int) -> Iterator[Profile]:
    """Profiles the steps inside, from the end of the first optimizer step to the end of step ``steps``."""
    activity = ProfilerActivity.CPU if setting.dry else ProfilerActivity.CUDA
    profiler, result = profile(activities=[activity]), Profile()
    done, started = 0, 0.0

    def after_step(*_: Any) -> None:
        nonlocal done, started
        done += 1
        if done == 1:
            profiler.start()
            started = time.perf_counter()
        if done == steps:
            if not setting.dry:
                torch.cuda.synchronize()
            result.wall = time.perf_counter() - started
            profiler.stop()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield result
    finally:
        hook.remove()
    path = setting.folder / "trace.json"
    profiler.export_chrome_trace(str(path))
    work = CPU_WORK if setting.dry else GPU_WORK
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") in work]
    path.unlink()
    result.operations = len(events)
    result.idle = 1 - covered((event["ts"], event["ts"] + event["dur"]) for event in events) / 1e6 / result.wall


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length


def mask_cost(setting: Setting, shape: Shape) -> Iterator[Figure]:
    """Attention of a micro-batch, forward and backward: the cost of a boolean mask, and of a new shape with cuDNN."""
    length = 32 if setting.dry else 1024
    without, masked = (partial(attend, setting, shape, length, with_mask) for with_mask in (False, True))
    switch = torch.backends.cuda.enable_cudnn_sdp
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        switch(False)
        taken = in_turns({"without": without, "masked": masked}, 5, setting.device)
        more = [1e3 * (one - other) for one, other in zip(taken["masked"], taken["without"], strict=True)]
        yield figure_of("boolean mask, a layer", more, "ms", "more than causal attention without one")
        switch(True)
        without()
        lengths = range(length, length + NEW_SHAPES)
        first, again = (
            [1e3 * seconds(partial(attend, setting, shape, one, False), setting.device) for one in lengths]
            for _ in range(2)
        )
    finally:
        switch(before)
    yield figure_of("cuDNN, a new shape", first, "ms", "of causal attention, forward and backward")
    yield figure_of("cuDNN, the same shape again", again, "ms")


def attend(setting: Setting, shape: Shape, length: int, with_mask: bool) -> None:
    """Causal attention of eight sequences, forward and backward."""
    dtype = torch.float32 if setting.dry else torch.bfloat16

    def heads() -> Tensor:
        return torch.randn(8, shape.heads, length, shape.head_width, device=setting.device, dtype=dtype)

    q_BHLE, k_BHLE, v_BHLE = (heads().requires_grad_() for _ in range(3))
    mask_B1LL = None
    if with_mask:  # as for padding on the right
        mask_B1LL = torch.ones(8, 1, length, length, dtype=torch.bool, device=setting.device).tril()
        mask_B1LL[0, :, :, -3:] = False
    attended_BHLE = scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, mask_B1LL, is_causal=not with_mask)
    attended_BHLE.sum().backward()

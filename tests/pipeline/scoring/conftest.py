"""What the tests of engines share: checkpoints, devices, and vLLM engines by their options."""

from typing import Any

import pytest
import torch
from tests.conftest import Models

from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.options import ModelName
from adpa.pipeline.scoring.vllm_engine import VllmEngine, open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 10**9
LARGE_MODEL = {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1}


@pytest.fixture
def teacher(models: Models) -> Checkpoint:
    return open_checkpoint(str(models.teacher))


@pytest.fixture
def reference(models: Models) -> Checkpoint:
    return open_checkpoint(str(models.reference))


def opened(
    options: VllmOptions,
    device: torch.device,
    teacher: Checkpoint,
    reference: Checkpoint | None = None,
    reason: str = "",
    dtype: str = "float32",
) -> VllmEngine:
    models: dict[ModelName, Checkpoint] = {"teacher": teacher}
    if reference is not None:
        models["reference"] = reference
    return open_vllm(options, device, models, dict.fromkeys(models, dtype), reason)


def engine(
    head_dtype: Any = None,
    with_reference: bool = False,
    device: torch.device = CPU,
    rounded_to: str | None = None,
    **options: Any,
) -> VllmEngine:
    return VllmEngine(VllmOptions(**options), device, head_dtype, with_reference, "", rounded_to)

"""Arguments that a run on a GPU has and a run on a CPU has not."""

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from adpa.pipeline.training.overrides import read_overrides
from adpa.pipeline.training.training_arguments import make_training_arguments


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU with bfloat16, as far as arguments know."""
    monkeypatch.setattr("adpa.pipeline.training.training_arguments.resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    return monkeypatch


def make(*overrides: str, bf16: bool | None = None, **arguments: Any) -> TrainingArguments:
    return make_training_arguments("auto", bf16=bf16, output_dir="out", **arguments | read_overrides(overrides, []))


@pytest.mark.parametrize(("bf16", "expected"), [(None, True), (True, True), (False, False)])
def test_a_gpu_computes_in_bfloat16_unless_told_otherwise(
    bf16: bool | None, expected: bool, gpu: pytest.MonkeyPatch
) -> None:
    made = make(bf16=bf16)
    assert (made.bf16, made.mixed_precision) == (expected, "bf16" if expected else "no")


def test_a_gpu_without_bfloat16_computes_in_float32(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not make().bf16


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    assert not make().bf16
    assert make(bf16=True).bf16


def test_on_a_gpu_two_workers_read_the_cache(gpu: pytest.MonkeyPatch) -> None:
    made = make()
    assert (made.dataloader_num_workers, made.dataloader_persistent_workers) == (2, True)
    assert made.dataloader_pin_memory
    chosen = make("dataloader_num_workers=0")
    assert (chosen.dataloader_num_workers, chosen.dataloader_persistent_workers) == (0, False)
    chosen = make("dataloader_persistent_workers=false")
    assert (chosen.dataloader_num_workers, chosen.dataloader_persistent_workers) == (2, False)


def test_on_a_cpu_none_does() -> None:
    assert make().dataloader_num_workers == 0

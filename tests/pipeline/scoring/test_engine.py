"""The choice of an engine, its reason, and the check that the models fit into memory."""

from typing import Any

import pytest
import torch
from tests.pipeline.conftest import InstallVllm
from tests.pipeline.scoring.conftest import CPU, GB, GPU

from adpa.errors import ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint
from adpa.pipeline.options import EngineName, ModelName
from adpa.pipeline.scoring.engine import Engine, HfEngine, choose_engine
from adpa.pipeline.scoring.vllm_engine import VllmEngine
from adpa.pipeline.scoring.vllm_options import VllmOptions


def choose(
    name: EngineName,
    device: torch.device,
    teacher: Checkpoint,
    options: VllmOptions | None = None,
    model: ModelName = "teacher",
    dtype: str = "float32",
) -> Engine:
    return choose_engine(name, options or VllmOptions(), device, {model: teacher}, {model: dtype})


@pytest.mark.parametrize(
    ("name", "device", "version", "kind", "reason"),
    [
        ("auto", CPU, "0.33.0+cpu", HfEngine, "there is no GPU"),
        ("auto", GPU, "0.33.0+cpu", HfEngine, "vllm 0.33.0+cpu is not for cuda"),
        ("auto", GPU, "0.40.0", HfEngine, "found vLLM 0.40.0; expected at least 0.32 and below 0.34"),
        ("auto", GPU, None, HfEngine, "vLLM is not installed"),
        ("auto", GPU, "0.33.0", VllmEngine, "a GPU and vLLM are there; hidden states and adpa's head"),
        ("hf", GPU, "0.33.0", HfEngine, "as asked"),
        ("vllm", CPU, "0.33.0+cpu", VllmEngine, "as asked; hidden states and adpa's head"),
    ],
)
def test_the_engine_is_chosen_by_what_is_there_and_says_why(
    name: EngineName,
    device: torch.device,
    version: str | None,
    kind: type,
    reason: str,
    teacher: Checkpoint,
    install_vllm: InstallVllm,
) -> None:
    install_vllm(version)
    engine = choose(name, device, teacher)
    assert type(engine) is kind
    assert engine.reason == reason


OPTIONS: dict[str, dict[str, Any]] = {
    "--tensor-parallel": {"tensor_parallel": 2},
    "--quantization": {"quantization": "fp8"},
    "--max-model-len": {"max_model_len": 4096},
    "--gpu-memory-utilization": {"gpu_memory_utilization": 0.5},
    "--head-dtype": {"head_dtype": "model"},
    "--engine-arg": {"engine_arg": ("seed=1",)},
}


@pytest.mark.parametrize("flag", OPTIONS)
def test_an_option_of_vllm_is_refused_by_its_name_where_transformers_runs(flag: str, teacher: Checkpoint) -> None:
    options = VllmOptions(**OPTIONS[flag])
    with pytest.raises(OptionError, match=rf"{flag} is for vLLM; the engine is hf \(as asked\)"):
        choose("hf", CPU, teacher, options)
    with pytest.raises(OptionError, match=rf"{flag} is for vLLM; the engine is hf \(there is no GPU\)"):
        choose("auto", CPU, teacher, options)


def test_an_option_without_a_meaning_is_refused_whatever_the_engine(teacher: Checkpoint) -> None:
    for name in ("auto", "hf", "vllm"):
        with pytest.raises(OptionError, match="--tensor-parallel 0; expected at least 1"):
            choose(name, CPU, teacher, VllmOptions(tensor_parallel=0))


def test_the_names_of_the_hf_engine_are_those_of_the_caches_that_are_there() -> None:
    engine = HfEngine(CPU, "")
    assert (engine.name, engine.sampling_name, engine.student_name) == ("hf", "hf", "hf")


def test_a_model_that_does_not_fit_is_refused_with_both_sizes_and_what_to_do(
    teacher: Checkpoint, install_vllm: InstallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm("0.33.0")
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    sizes = r"its weights take about 140\.0 GB in bfloat16; there is room for"
    with pytest.raises(ModelError, match=rf"{teacher.name}: {sizes} 80\.0 GB; use --engine vllm"):
        choose("hf", GPU, teacher, dtype="bfloat16")
    with pytest.raises(ModelError, match=rf"{sizes} 72\.0 GB; use more GPUs \(--tensor-parallel\)"):
        choose("vllm", GPU, teacher, dtype="bfloat16")


ROOM: list[dict[str, Any]] = [
    {"tensor_parallel": 2},
    {"quantization": "fp8"},
    {"engine_arg": ("tensor_parallel_size=2",)},
    {"engine_arg": ("pipeline_parallel_size=2",)},
    {"engine_arg": ("teacher:quantization=bitsandbytes",)},
    {"engine_arg": ("teacher:cpu_offload_gb=70",)},
]


@pytest.mark.parametrize("options", ROOM, ids=str)
def test_what_makes_room_for_a_large_model_counts(
    options: dict[str, Any], teacher: Checkpoint, install_vllm: InstallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm("0.33.0")
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    choose("vllm", GPU, teacher, VllmOptions(**options))


def test_the_student_runs_as_it_is_on_one_gpu(
    teacher: Checkpoint, install_vllm: InstallVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_vllm("0.33.0")
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    with pytest.raises(ModelError, match=r"there is room for 72\.0 GB"):
        choose("vllm", GPU, teacher, VllmOptions(tensor_parallel=8, quantization="fp8"), model="student")


def test_a_model_is_measured_in_the_dtype_that_it_is_loaded_in(
    teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = teacher.weight_bytes("bfloat16")
    monkeypatch.setattr("adpa.pipeline.scoring.engine.device_memory", lambda _: room)
    choose("hf", CPU, teacher, dtype="bfloat16")
    with pytest.raises(ModelError, match="in float32"):
        choose("hf", CPU, teacher, dtype="float32")

"""Which engine runs the models, why it is this one, and what does not fit into its memory."""

from typing import Any

import pytest
import torch
from tests.conftest import Models
from tests.pipeline.conftest import InstallVllm

from adpa.errors import ModelError, OptionError
from adpa.pipeline.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.engine import EngineName, HfEngine, check_fits, choose_engine
from adpa.pipeline.engine_vllm import VllmEngine, VllmOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GB = 10**9


@pytest.fixture
def teacher(models: Models) -> Checkpoint:
    return open_checkpoint(str(models.teacher))


@pytest.mark.parametrize(
    ("name", "device", "version", "kind", "reason"),
    [
        ("auto", CPU, "0.33.0", HfEngine, "there is no GPU"),
        ("auto", GPU, None, HfEngine, "vLLM is not installed"),
        ("auto", GPU, "0.33.0", VllmEngine, "a GPU and vLLM are there; hidden states and adpa's head"),
        ("hf", GPU, "0.33.0", HfEngine, "as asked"),
        ("vllm", CPU, "0.33.0", VllmEngine, "as asked; hidden states and adpa's head"),
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
    engine = choose_engine(name, VllmOptions(), device, teacher, None)
    assert type(engine) is kind
    assert engine.reason == reason


def test_a_version_of_vllm_that_was_not_tested_is_not_passed_over_in_silence(
    teacher: Checkpoint, install_vllm: InstallVllm
) -> None:
    install_vllm("0.40.0")
    with pytest.raises(OptionError, match=r"found vLLM 0\.40\.0"):
        choose_engine("auto", VllmOptions(), GPU, teacher, None)


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
        choose_engine("hf", options, CPU, teacher, None)
    with pytest.raises(OptionError, match=rf"{flag} is for vLLM; the engine is hf \(there is no GPU\)"):
        choose_engine("auto", options, CPU, teacher, None)


def test_an_option_without_a_meaning_is_refused_whatever_the_engine(teacher: Checkpoint) -> None:
    for name in ("auto", "hf", "vllm"):
        with pytest.raises(OptionError, match="--tensor-parallel 0; expected at least 1"):
            choose_engine(name, VllmOptions(tensor_parallel=0), CPU, teacher, None)


def test_the_names_of_the_hf_engine_are_those_of_the_caches_that_are_there() -> None:
    engine = HfEngine(CPU, "")
    assert (engine.name, engine.sampling_name) == ("hf", "hf")


def give_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("engine", "engine_vllm"):
        monkeypatch.setattr(f"adpa.pipeline.{module}.device_memory", lambda _: size)


def vllm_engine(**options: Any) -> VllmEngine:
    return VllmEngine(VllmOptions(**options), GPU, None, with_reference=False, reason="")


def test_a_model_that_does_not_fit_is_refused_with_both_sizes_and_what_to_do(
    teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    give_memory(monkeypatch, 80 * GB)
    sizes = r"its weights take about 140\.0 GB in bfloat16; there is room for"
    with pytest.raises(ModelError, match=rf"{teacher.name}: {sizes} 80\.0 GB; use --engine vllm"):
        check_fits(HfEngine(GPU, ""), "teacher", teacher, "bfloat16")
    with pytest.raises(ModelError, match=rf"{sizes} 72\.0 GB; use more GPUs \(--tensor-parallel\)"):
        check_fits(vllm_engine(), "teacher", teacher, "bfloat16")


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel": 2},
        {"quantization": "fp8"},
        {"engine_arg": ("tensor_parallel_size=2",)},
        {"engine_arg": ("pipeline_parallel_size=2",)},
        {"engine_arg": ("teacher:quantization=bitsandbytes",)},
        {"engine_arg": ("cpu_offload_gb=70",)},
    ],
    ids=str,
)
def test_what_makes_room_for_a_large_model_counts(
    options: dict[str, Any], teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    give_memory(monkeypatch, 80 * GB)
    check_fits(vllm_engine(**options), "teacher", teacher, "bfloat16")


def test_the_student_runs_as_it_is_on_one_gpu(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "weight_bytes", lambda *_: 140 * GB)
    give_memory(monkeypatch, 80 * GB)
    with pytest.raises(ModelError, match=r"there is room for 72\.0 GB"):
        check_fits(vllm_engine(tensor_parallel=8, quantization="fp8"), "student", teacher, "bfloat16")


def test_a_model_is_measured_in_the_dtype_that_it_is_loaded_in(
    teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_memory(monkeypatch, teacher.weight_bytes("bfloat16"))
    check_fits(HfEngine(CPU, ""), "teacher", teacher, "bfloat16")
    with pytest.raises(ModelError, match="in float32"):
        check_fits(HfEngine(CPU, ""), "teacher", teacher, "float32")

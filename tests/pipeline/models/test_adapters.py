"""Adapters as models: merged into their base when they are loaded, with base and adapter in the identity."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from tests.pipeline.conftest import SMALL, save_random
from tests.pipeline.models.adapters import (
    CONFIG,
    CPU,
    LORA,
    WEIGHTS,
    change_weights,
    copy,
    digest,
    edit,
    logits,
    save_adapter,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.merged_weights import merged_weights

# Merging


def test_the_weights_are_those_of_the_base_and_the_product_of_the_adapter(base: Path, adapter: Path) -> None:
    model = open_checkpoint(str(adapter)).load("float32", CPU)
    before, added = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS)
    changed = 0
    for name, tensor in model.state_dict().items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{prefix}.lora_A.weight" in added:
            product = added[f"{prefix}.lora_B.weight"] @ added[f"{prefix}.lora_A.weight"]
            expected, changed = expected + 3.0 * product, changed + 1  # alpha / r = 6 / 2
        assert torch.equal(tensor, expected), name
    assert changed == 4


OTHERS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(**LORA),
    "lora with its rank under the root": lambda: LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "lora with biases": lambda: LoraConfig(**LORA, bias="lora_only"),
    "head of its own": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "lora on head and embeddings": lambda: LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"]),
    "some tokens of its own": lambda: LoraConfig(**LORA, trainable_token_indices=[5, 7]),
    "loha": lambda: LoHaConfig(r=2, target_modules=["q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "adalora": lambda: AdaLoraConfig(init_r=2, total_step=10, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_the_model_is_the_one_that_peft_merges(kind: str, dtype: str, base: Path, tmp_path: Path) -> None:
    directory = save_adapter(base, tmp_path, OTHERS[kind]())
    model = open_checkpoint(str(directory)).load(dtype, CPU)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    unchanged = logits(original)
    expected: Any = PeftModel.from_pretrained(original, str(directory)).merge_and_unload()
    assert model.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), unchanged)


def test_a_merged_model_can_be_trained_and_leaves_the_generator_of_random_numbers_alone(adapter: Path) -> None:
    """PEFT freezes the base, and draws starting values."""
    state = torch.get_rng_state()
    model = open_checkpoint(str(adapter)).load("float32", CPU)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    assert model.name_or_path == str(adapter)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("archive", [True, False], ids=["zip archive", "format of old versions of torch"])
def test_weights_as_a_pickle_are_merged_too(archive: bool, adapter: Path, tmp_path: Path) -> None:
    directory, pickled = copy(adapter, tmp_path / "pickle"), "adapter_model.bin"
    torch.save(load_file(directory / WEIGHTS), directory / pickled, _use_new_zipfile_serialization=archive)
    assert digest(directory) == digest(adapter), "PEFT loads the safetensors"
    (directory / WEIGHTS).unlink()
    assert digest(directory) != digest(adapter)
    models = [open_checkpoint(str(each)).load("float32", CPU) for each in (directory, adapter)]
    assert torch.equal(logits(models[0]), logits(models[1]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [100, 128, 64])
def test_embeddings_that_the_adapter_resized_are_those_of_the_merged_model(
    tied: bool, rows: int, tmp_path: Path
) -> None:
    base = save_random(LlamaConfig(**SMALL, tie_word_embeddings=tied), tmp_path / "base").directory
    directory = save_adapter(base, tmp_path / "adapter", rows=rows)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.config.vocab_size == rows
    checkpoint.check_ids(rows - 1)
    with pytest.raises(ModelError, match=f"the model has {rows} embeddings"):
        checkpoint.check_ids(rows)
    model: Any = checkpoint.load("float32", CPU)
    saved = load_file(directory / WEIGHTS)["base_model.model.model.embed_tokens.weight"]
    assert saved.shape == (rows, 32)
    assert torch.equal(model.get_input_embeddings().weight, saved)
    assert logits_of_one(model).shape == (rows,)
    with merged_weights(checkpoint, "float32") as whole:
        assert whole.load_head("float32", CPU).weight.shape == (rows, 32)


def logits_of_one(model: Any) -> Tensor:
    return model(input_ids=torch.tensor([[3]])).logits[0, 0]


def test_resized_embeddings_without_the_head_are_refused(base: Path, tmp_path: Path) -> None:
    directory = save_adapter(base, tmp_path, rows=100)
    change_weights(directory / WEIGHTS, lambda weights: weights.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ModelError, match="has 100 embeddings, its base 96, and it brings embed_tokens alone"):
        open_checkpoint(str(directory)).load("float32", CPU)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_change_of_embeddings_that_are_also_the_head_is_refused(target: str, tmp_path: Path) -> None:
    base = save_random(LlamaConfig(**SMALL, tie_word_embeddings=True), tmp_path / "base").directory
    directory = save_adapter(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=[target, "q_proj"]))
    with pytest.raises(ModelError, match="changes embeddings that are also the head"):
        open_checkpoint(str(directory)).load("float32", CPU)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_its_own_unties_a_tied_base(dtype: str, tmp_path: Path) -> None:
    base = save_random(LlamaConfig(**SMALL, tie_word_embeddings=True), tmp_path / "base").directory
    checkpoint = open_checkpoint(
        str(save_adapter(base, tmp_path / "a", LoraConfig(**LORA, modules_to_save=["lm_head"])))
    )
    model: Any = checkpoint.load(dtype, CPU)
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    with merged_weights(checkpoint, dtype) as whole:
        assert torch.equal(logits(whole.load(dtype, CPU)), logits(model))


# Identity


def test_the_identity_covers_base_and_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = save_adapter(base, tmp_path / "other", seed=2)
    scaled = copy(adapter, tmp_path / "scaled")
    edit(scaled / CONFIG, lora_alpha=12)
    moved = copy(base, tmp_path / "base")
    elsewhere = copy(adapter, tmp_path / "elsewhere")
    edit(elsewhere / CONFIG, base_model_name_or_path=str(moved))
    assert digest(elsewhere) == digest(adapter)
    change_weights(moved / "model.safetensors", lambda weights: weights["model.norm.weight"].add_(1))
    assert len({digest(each) for each in (base, moved, adapter, elsewhere, other, scaled)}) == 6


def test_one_changed_bit_of_an_adapter_is_another_model(adapter: Path, tmp_path: Path) -> None:
    changed = copy(adapter, tmp_path / "changed")
    payload = bytearray((changed / WEIGHTS).read_bytes())
    payload[-1] ^= 1
    (changed / WEIGHTS).write_bytes(payload)
    assert digest(changed) != digest(adapter)


def test_the_place_of_the_base_does_not_matter(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = copy(adapter, tmp_path / "moved")
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    for place in (f"{base}/", f"{base.parent}/./{base.name}", str(tmp_path / "link"), "link", "./link"):
        edit(moved / CONFIG, base_model_name_or_path=place, revision="main")
        assert digest(moved) == digest(adapter)
    (moved / "README.md").write_text("x")
    (moved / "config.json").write_text("{}")
    (moved / "training_args.bin").write_bytes(b"x")
    assert digest(moved) == digest(adapter), "they are not loaded"


# What belongs to a checkpoint


def test_configuration_size_and_end_are_those_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    checkpoint, whole = open_checkpoint(str(adapter)), open_checkpoint(str(base))
    assert (checkpoint.name, checkpoint.revision, checkpoint.adapter) == (str(adapter), None, adapter)
    assert checkpoint.config.to_dict() == whole.config.to_dict()
    assert checkpoint.dtype_name("auto") == "float32"
    assert checkpoint.weight_bytes("bfloat16") == whole.weight_bytes("bfloat16")
    assert checkpoint.eos_token_ids == whole.eos_token_ids == (2,)
    assert not checkpoint.is_quantized
    own = copy(adapter, tmp_path / "own")
    GenerationConfig(eos_token_id=[7, 2]).save_pretrained(own)
    assert open_checkpoint(str(own)).eos_token_ids == (7, 2)


def test_another_process_gets_both_directories(adapter: Path, tmp_path: Path) -> None:
    moved = copy(adapter, tmp_path / "moved")
    checkpoint = open_checkpoint(str(moved))
    there: Checkpoint = pickle.loads(pickle.dumps(checkpoint))
    assert (there, there.identity) == (checkpoint, checkpoint.identity)
    there.check_here()
    shutil.rmtree(moved)
    with pytest.raises(ModelError, match=f"has no {moved}"):
        there.check_here()


def test_the_tokenizer_is_the_adapters_own_or_the_bases(
    adapter: Path, base: Path, small_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with_tokenizer, own = copy(base, tmp_path / "base"), copy(adapter, tmp_path / "own")
    small_tokenizer.save_pretrained(with_tokenizer)
    edit(own / CONFIG, base_model_name_or_path=str(with_tokenizer))
    assert open_checkpoint(str(own)).tokenizer.get_vocab() == small_tokenizer.get_vocab()
    changed = AutoTokenizer.from_pretrained(with_tokenizer)
    changed.add_tokens(["<own>"])
    changed.save_pretrained(own)
    assert "<own>" in open_checkpoint(str(own)).tokenizer.get_vocab()
    assert "<own>" not in open_checkpoint(str(with_tokenizer)).tokenizer.get_vocab()


def test_a_chat_template_without_a_tokenizer_is_not_ignored(adapter: Path, tmp_path: Path) -> None:
    own = copy(adapter, tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelError, match=f"{own}: no tokenizer could be loaded .*; save one there"):
        open_checkpoint(str(own)).tokenizer  # noqa: B018

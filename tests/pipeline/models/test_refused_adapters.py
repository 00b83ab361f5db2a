"""Adapters that cannot be used are refused by name; adapters of the Hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from tests.pipeline.conftest import SMALL, save_random, say_quantized
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
from transformers import LlamaConfig

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import open_checkpoint

# What is refused


@pytest.mark.parametrize("files", [(CONFIG, WEIGHTS), (CONFIG,), (WEIGHTS,), ("adapter_model.bin",)])
@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_whole_weights_beside_an_adapter_are_refused(
    files: tuple[str, ...], whole: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copy(base / "config.json", tmp_path)
    shutil.copy(base / "model.safetensors", tmp_path / whole)
    for file in files:
        shutil.copy(adapter / (WEIGHTS if file.endswith("bin") else file), tmp_path / file)
    expected = rf"{tmp_path}: it has whole weights and an adapter \({files[0]}\); merge it or remove it$"
    with pytest.raises(ModelError, match=expected):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_its_kind(
    config: PeftConfig, kind: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=f"an adapter of the kind {kind} cannot be merged into its base"):
        open_checkpoint(str(save_adapter(base, tmp_path, config)))


def test_an_adapter_that_works_behind_some_tokens_alone_is_refused(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(**LORA, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.raises(ModelError, match="an activated LoRA cannot be merged into its base"):
        open_checkpoint(str(save_adapter(base, tmp_path, config)))


def test_a_kind_whose_merge_peft_lacks_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*_: object, **__: object) -> None:
        raise NotImplementedError("Merging is not supported for this layer!")

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", merge)
    with pytest.raises(ModelError, match="cannot be merged: Merging is not supported for this layer!; use LoRA"):
        open_checkpoint(str(adapter)).load("float32", CPU)


def test_too_little_memory_for_a_merge_is_no_fault_of_the_base(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", merge)
    with pytest.raises(torch.OutOfMemoryError):
        open_checkpoint(str(adapter)).load("float32", CPU)


def test_a_configuration_without_a_kind_is_refused(adapter: Path, tmp_path: Path) -> None:
    directory = copy(adapter, tmp_path / "a")
    config = json.loads((directory / CONFIG).read_text())
    del config["peft_type"]
    (directory / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its adapter_config\.json has no peft_type; save the adapter again"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 5}, 7, None], ids=str)
def test_a_pickle_of_something_else_is_refused(content: object, adapter: Path, tmp_path: Path) -> None:
    directory = copy(adapter, tmp_path / "a")
    (directory / WEIGHTS).unlink()
    torch.save(content, directory / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin has something else than named tensors"):
        open_checkpoint(str(directory))


def test_an_adapter_that_repeats_layers_is_refused(adapter: Path, tmp_path: Path) -> None:
    directory = copy(adapter, tmp_path / "a")
    edit(directory / CONFIG, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ModelError, match="repeats layers"):
        open_checkpoint(str(directory))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(A), "1 missing keys, the first base_model.*q_proj.lora_A"),
        (
            lambda weights: weights.update({A.replace("q_proj", "k_proj"): torch.ones(2, 32)}),
            "1 unexpected keys, .*k_proj",
        ),
        (lambda weights: weights.update({A: torch.ones(3, 32)}), r"size mismatch for .*\[3, 32\].*\[2, 32\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    change: Callable[[dict[str, Tensor]], object], message: str, adapter: Path, tmp_path: Path
) -> None:
    directory = copy(adapter, tmp_path / "a")
    change_weights(directory / WEIGHTS, change)
    with pytest.raises(ModelError, match=message) as raised:
        open_checkpoint(str(directory)).load("float32", CPU)
    assert "\n" not in str(raised.value)


def test_a_head_of_its_own_that_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    directory = save_adapter(base, tmp_path, LoraConfig(**LORA, modules_to_save=["lm_head"]))
    change_weights(directory / WEIGHTS, lambda weights: weights.pop("base_model.model.lm_head.weight"))
    with pytest.raises(ModelError, match=r"its weights lack base_model\.model\.lm_head\.weight"):
        open_checkpoint(str(directory)).load("float32", CPU)


def test_a_base_of_another_shape_is_refused_in_one_line(adapter: Path, tmp_path: Path) -> None:
    other = save_random(LlamaConfig(**SMALL | {"hidden_size": 64}), tmp_path / "base").directory
    directory = copy(adapter, tmp_path / "a")
    edit(directory / CONFIG, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match="PEFT cannot merge it into its base: size mismatch for") as raised:
        open_checkpoint(str(directory)).load("float32", CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("missing", ["no weights", "an empty file", "a pointer", "a damaged file"])
def test_an_adapter_that_is_not_complete_is_refused(missing: str, adapter: Path, tmp_path: Path) -> None:
    directory = copy(adapter, tmp_path / "a")
    weights, message = directory / WEIGHTS, "found adapter_config.json, but no adapter_model.safetensors or"
    weights.unlink()
    if missing != "no weights":
        content, message = {
            "an empty file": (b"", "is empty"),
            "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
            "a damaged file": ((adapter / WEIGHTS).read_bytes()[:-9], "is damaged"),
        }[missing]
        weights.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_model_name_or_path": None}, "its adapter_config.json names no base"),
        ({"base_model_name_or_path": ""}, "its adapter_config.json names no base"),
        ({"peft_type": "SORCERY"}, "PEFT cannot read its adapter_config.json"),
        ({"peft_type": None}, r"its adapter_config\.json has no peft_type; save the adapter again"),
        ({"target_modules": ["no_such_layer"]}, "PEFT cannot merge it into its base: Target modules"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    values: dict[str, Any], message: str, adapter: Path, tmp_path: Path
) -> None:
    directory = copy(adapter, tmp_path / "a")
    edit(directory / CONFIG, **values)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(str(directory)).load("float32", CPU)


def test_a_base_that_cannot_be_used_is_refused_with_the_adapters_name(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)  # beside which lies no directory with the name of the base
    quantized = copy(base, tmp_path / "quantized")
    say_quantized(open_checkpoint(str(quantized)))
    damaged = copy(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    directory = copy(adapter, tmp_path / "a")
    for place, problem in {
        "../base": r"\.\./base: no such directory; .* a relative path from the working directory",
        str(adapter): f"{adapter}: it is an adapter itself; merge {adapter} into its own base",
        str(quantized): "its weights are quantized on disk",
        str(damaged): r"model\.safetensors is empty",
        str(tmp_path): "found no config.json",
    }.items():
        edit(directory / CONFIG, base_model_name_or_path=place)
        with pytest.raises(ModelError, match=rf"^{directory}: an adapter whose base cannot be used: .*{problem}"):
            open_checkpoint(str(directory))


def test_without_peft_it_says_what_to_install(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpa.pipeline.models.adapters.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"an adapter, and PEFT is not installed; pip install 'adpa\[lora\]'"):
        open_checkpoint(str(adapter))


# On the Hub


@pytest.fixture
def hub(base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub whose repositories are folders; gives the patterns' files alone, as the real one does."""
    for name, content in {"base": base, "adapter": adapter}.items():
        copy(content, tmp_path / "hub" / name)
    edit(tmp_path / "hub" / "adapter" / CONFIG, base_model_name_or_path="org/base", revision="v1")

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        repository = tmp_path / "hub" / name.removeprefix("org/")
        if not repository.is_dir():
            raise RepositoryNotFoundError(f"no {name}", response=None)  # type: ignore[arg-type]
        snapshot = tmp_path / "snapshots" / repository.name / f"commit-of-{revision}"
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in repository.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, snapshot)
        return str(snapshot)

    monkeypatch.setattr("adpa.pipeline.models.model_names.snapshot_download", snapshot_download)
    return tmp_path / "hub"


def test_an_adapter_of_the_hub_is_that_of_a_directory(hub: Path, adapter: Path) -> None:
    checkpoint = open_checkpoint("org/adapter@main")
    assert (checkpoint.name, checkpoint.revision) == ("org/adapter@main", "commit-of-main")
    assert checkpoint.directory.parts[-2:] == ("base", "commit-of-v1")
    assert checkpoint.identity.digest == digest(adapter)
    expected = open_checkpoint(str(adapter)).load("float32", CPU)
    assert torch.equal(logits(checkpoint.load("float32", CPU)), logits(expected))


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_an_adapter_beside_whole_weights_on_the_hub_is_noticed(whole: str, hub: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", hub / "adapter" / whole)
    for config in (True, False):
        with pytest.raises(ModelError, match="org/adapter: it has whole weights and an adapter"):
            open_checkpoint("org/adapter")
        shutil.rmtree(hub.parent / "snapshots")
        if config:
            (hub / "adapter" / CONFIG).unlink()

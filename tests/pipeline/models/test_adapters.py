"""Adapters as models: merged into their base when they are loaded, with base and adapter in the identity."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tests.pipeline.conftest import SMALL, save_random, say_quantized
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.lm_head import hidden_states, read_head

CPU = torch.device("cpu")
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(LlamaConfig(**SMALL, tie_word_embeddings=False), tmp_path_factory.mktemp("base")).directory


def save_adapter(
    base: Path, to: Path, config: PeftConfig | None = None, seed: int = 1, rows: int | None = None
) -> Path:
    """An adapter with random numbers, as PEFT saves it."""
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        loaded.resize_token_embeddings(rows)
    torch.manual_seed(seed)
    model: Any = get_peft_model(loaded, config or LoraConfig(**LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def copy(adapter: Path, to: Path) -> Path:
    shutil.copytree(adapter, to)
    return to


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def digest(directory: Path) -> str:
    return open_checkpoint(str(directory)).identity.digest


def logits(model: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(3, 96, (2, 9))).logits


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


def test_weights_as_a_pickle_are_merged_too(adapter: Path, tmp_path: Path) -> None:
    directory = copy(adapter, tmp_path / "pickle")
    torch.save(load_file(directory / WEIGHTS), directory / "adapter_model.bin")
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
    assert checkpoint.load_head("float32", CPU).weight.shape == (rows, 32)


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
    whole = checkpoint.whole(dtype).load(dtype, CPU)
    assert torch.equal(logits(whole), logits(model))


# A directory of whole weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_written_once_for_engines_that_read_files(
    dtype: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    checkpoint = Checkpoint(
        f"for {dtype}", None, *(getattr(open_checkpoint(str(adapter)), n) for n in ("directory", "adapter"))
    )
    with caplog.at_level(logging.WARNING):
        whole = checkpoint.whole(dtype)
    assert whole.directory.parent == tmp_path
    assert f"for {dtype}: its merged weights take 0.0 GB in {whole.directory}" in caplog.text
    assert (whole.name, whole.adapter, whole.is_quantized) == (checkpoint.name, None, False)
    assert whole.config.dtype == getattr(torch, dtype)
    assert torch.equal(logits(whole.load(dtype, CPU)), logits(checkpoint.load(dtype, CPU)))
    assert checkpoint.whole(dtype).directory == whole.directory
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again.whole(dtype).directory == whole.directory
    assert whole.whole(dtype) is whole
    checkpoint.forget_whole("float16")
    assert whole.directory.exists()
    checkpoint.forget_whole(dtype)
    checkpoint.forget_whole(dtype)
    assert not list(tmp_path.iterdir())


def test_merged_weights_are_removed_when_the_process_ends(adapter: Path, tmp_path: Path) -> None:
    code = "import sys; from adpa.pipeline.models.checkpoint import open_checkpoint as o; c = o(sys.argv[1])"
    command = [sys.executable, "-c", f"{code}; print(c.whole('float32').directory); sys.exit(3)", str(adapter)]
    ended = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert Path(ended.stdout.strip()).parent == tmp_path
    assert not list(tmp_path.glob("adpa-merged-*"))


def test_no_room_for_merged_weights_is_said_in_one_line(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_pretrained(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", save_pretrained)
    with pytest.raises(ModelError, match=r"weights, 0\.0 GB, cannot be written: .*No space left on device; set TMPDIR"):
        open_checkpoint(str(adapter)).whole("float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["lora", "head of its own", "lora on head and embeddings"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_alone_is_that_of_the_merged_model(kind: str, dtype: str, base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_adapter(base, tmp_path, OTHERS[kind]())))
    model = checkpoint.load(dtype, CPU).eval()
    head = checkpoint.load_head(dtype, CPU)
    assert torch.equal(head.weight, read_head(model).weight)
    if dtype == "float32":
        ids = torch.randint(3, 96, (2, 5))
        with torch.no_grad():
            assert torch.equal(
                head.logits(hidden_states(model, ids, torch.ones_like(ids))), model(input_ids=ids).logits
            )


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
    quantized = copy(base, tmp_path / "quantized")
    say_quantized(open_checkpoint(str(quantized)))
    damaged = copy(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"")
    directory = copy(adapter, tmp_path / "a")
    for place, problem in {
        "../base": r"\.\./base: no such directory, .* a relative path from the working directory",
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

    monkeypatch.setattr("adpa.pipeline.models.weight_files.snapshot_download", snapshot_download)
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

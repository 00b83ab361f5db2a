"""The files of a checkpoint: what is loaded is digested, and nothing else; what is loaded is never in doubt."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pipeline.conftest import SMALL, save_random
from transformers import AutoModelForCausalLM, LlamaConfig

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import open_checkpoint

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in four forms: whole and in shards, as safetensors and as pickles."""
    folder = tmp_path_factory.mktemp("forms")
    checkpoint = save_random(LlamaConfig(**SMALL, tie_word_embeddings=False), folder / "whole")
    checkpoint.load("float32", CPU).save_pretrained(folder / "shards", max_shard_size="24KB")
    weights = load_file(folder / "whole" / "model.safetensors")
    for form in ("pickle", "pickles"):
        (folder / form).mkdir()
        shutil.copy(folder / "whole" / "config.json", folder / form)
    torch.save(weights, folder / "pickle" / "pytorch_model.bin")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]}
    for file, tensors in parts.items():
        torch.save({name: weights[name] for name in tensors}, folder / "pickles" / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pickles" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


FORMS = ("whole", "shards", "pickle", "pickles")


def copy(originals: Path, form: str, to: Path) -> Path:
    shutil.copytree(originals / form, to / form)
    return to / form


def digest(directory: Path) -> str:
    return open_checkpoint(str(directory)).identity.digest


def formula(directory: Path, *names: str) -> str:
    """The digest as it is written down in users' caches."""

    def of(content: bytes) -> str:
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    return of("\n".join(f"{name} {of((directory / name).read_bytes())}" for name in names).encode())


def change_norm(path: Path) -> None:
    """Another model of the same shapes."""
    weights = load_file(path)
    weights[NORM] = weights[NORM] + 1
    save_file(weights, path, metadata={"format": "pt"})


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What is loaded is digested


@pytest.mark.parametrize("form", FORMS)
def test_the_digest_is_that_of_the_configuration_and_the_weights_in_the_order_of_their_names(
    form: str, originals: Path
) -> None:
    directory = originals / form
    weights = sorted(file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))
    assert len(weights) == {"whole": 1, "pickle": 1, "pickles": 2}.get(form, len(weights)) > (form == "shards")
    assert digest(directory) == formula(directory, "config.json", *weights)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_the_same_numbers_and_has_its_own_size(form: str, originals: Path) -> None:
    checkpoint = open_checkpoint(str(originals / form))
    expected = load_file(originals / "whole" / "model.safetensors")
    state = checkpoint.load("float32", CPU).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    size = sum(tensor.nbytes for tensor in expected.values())
    assert size <= checkpoint.weight_bytes("float32") < 1.3 * size


@pytest.mark.parametrize("form", ["whole", "shards"])
@pytest.mark.parametrize("other", ["pickle", "pickles"])
def test_pickles_beside_safetensors_are_not_loaded_and_not_digested(
    form: str, other: str, originals: Path, tmp_path: Path
) -> None:
    directory = copy(originals, form, tmp_path)
    for file in (originals / other).glob("pytorch_model*"):
        shutil.copy(file, directory)
    before = digest(directory)
    assert before == digest(originals / form)
    for file in directory.glob("*.bin"):
        torch.save({NORM: torch.zeros(32)}, file)
    assert digest(directory) == before
    change_norm(next(file for file in directory.glob("*.safetensors") if NORM in load_file(file)))
    assert digest(directory) != before


def test_a_shard_that_the_index_does_not_name_is_not_loaded_and_not_digested(originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "shards", tmp_path)
    for name in ("model-00009-of-00009.safetensors", "consolidated.safetensors"):
        save_file({NORM: torch.zeros(32)}, directory / name, metadata={"format": "pt"})
        assert digest(directory) == digest(originals / "shards")
    model = open_checkpoint(str(directory)).load("float32", CPU)
    expected = load_file(originals / "whole" / "model.safetensors")[NORM]
    assert torch.equal(model.state_dict()[NORM], expected)


def test_linked_weights_are_those_that_they_lead_to(originals: Path, tmp_path: Path) -> None:
    for form in FORMS:
        (tmp_path / form).mkdir()
        for file in (originals / form).iterdir():
            (tmp_path / form / file.name).symlink_to(file)
        assert digest(tmp_path / form) == digest(originals / form)


def test_hidden_files_and_what_trainers_write_beside_the_weights_do_not_matter(originals: Path, tmp_path: Path) -> None:
    for form in FORMS:
        directory = copy(originals, form, tmp_path)
        for name in ("._model.safetensors", "training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt"):
            (directory / name).write_bytes(b"x")
        assert digest(directory) == digest(originals / form)


def test_weights_that_change_between_two_looks_are_another_model(originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "whole", tmp_path)
    opened = open_checkpoint(str(directory))
    change_norm(directory / "model.safetensors")
    assert opened.identity.digest == digest(directory) != digest(originals / "whole")


@pytest.mark.parametrize(
    "name",
    ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"],
)
def test_settings_of_a_quantization_in_a_file_of_their_own_are_digested(
    name: str, originals: Path, tmp_path: Path
) -> None:
    directory = copy(originals, "whole", tmp_path)
    assert not open_checkpoint(str(directory)).is_quantized
    digests = {digest(directory)}
    for bits in (4, 8):
        (directory / name).write_text(json.dumps({"bits": bits}))
        assert open_checkpoint(str(directory)).is_quantized
        digests.add(digest(directory))
    assert digest(directory) == formula(directory, "config.json", "model.safetensors", name)
    assert len(digests) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_settings_of_a_quantization_in_the_configuration_are_seen(
    values: dict[str, Any], originals: Path, tmp_path: Path
) -> None:
    directory = copy(originals, "whole", tmp_path)
    edit(directory / "config.json", **values)
    assert open_checkpoint(str(directory)).is_quantized
    assert digest(directory) != digest(originals / "whole")


def test_a_configuration_for_another_version_of_transformers_is_digested(originals: Path, tmp_path: Path) -> None:
    """transformers reads the file with the largest version that is not above its own."""
    directory = copy(originals, "whole", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    edit(directory / "config.json", configuration_files=["config.4.0.0.json", "config.json"])
    digests = set()
    for epsilon in (1e-5, 1e-3):
        (directory / "config.4.0.0.json").write_text(json.dumps(config | {"rms_norm_eps": epsilon}))
        checkpoint = open_checkpoint(str(directory))
        assert checkpoint.config.rms_norm_eps == epsilon
        digests.add(checkpoint.identity.digest)
    assert len(digests) == 2


# What is loaded is not in doubt


def test_whole_weights_beside_an_index_are_refused(originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "shards", tmp_path)
    shutil.copy(originals / "whole" / "model.safetensors", directory)
    with pytest.raises(
        ModelError,
        match=r"transformers loads model\.safetensors, vLLM model-00001-of-.* more; "
        r"remove model-00001-of-.* to keep model\.safetensors, or the other way round",
    ):
        open_checkpoint(str(directory))
    (directory / INDEX).unlink()
    with pytest.raises(ModelError, match="more than one model"):
        open_checkpoint(str(directory))
    for file in directory.glob("model-*"):
        file.unlink()
    assert digest(directory) == digest(originals / "whole")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "other.safetensors"])
@pytest.mark.parametrize("form", ["whole", "pickle", "pickles"])
def test_other_safetensors_without_an_index_are_refused(name: str, form: str, originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, form, tmp_path)
    save_file({NORM: torch.zeros(32)}, directory / name, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=f"more than one model: transformers loads .*, vLLM .*{name}.*; remove {name} "
    ):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("form", ["pickle", "pickles"])
def test_other_pickles_are_refused(form: str, originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, form, tmp_path)
    torch.save({NORM: torch.zeros(32)}, directory / "pytorch_model-00009-of-00009.bin")
    with pytest.raises(ModelError, match=r"remove pytorch_model-00009-of-00009\.bin to keep"):
        open_checkpoint(str(directory))


def test_weights_that_the_configuration_alone_names_are_refused(originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "whole", tmp_path)
    edit(directory / "config.json", transformers_weights="model.safetensors")
    open_checkpoint(str(directory))
    shutil.copy(directory / "model.safetensors", directory / "special.safetensors")
    edit(directory / "config.json", transformers_weights="special.safetensors")
    with pytest.raises(ModelError, match=r"transformers loads special\.safetensors, vLLM model\.safetensors, special"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(("form", "damage"), [("shards", "removed"), ("pickles", "removed"), ("shards", "dangling")])
def test_a_shard_that_is_missing_is_named(form: str, damage: str, originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, form, tmp_path)
    shard = sorted([*directory.glob("model-*"), *directory.glob("*.bin")])[0]
    shard.unlink()
    if damage == "dangling":
        shard.symlink_to("nowhere")
    with pytest.raises(ModelError, match=rf"index\.json names {shard.name}, which is missing"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": null}}', "{", ""])
def test_an_index_that_cannot_be_read_is_refused(content: str, originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "shards", tmp_path)
    (directory / INDEX).write_text(content)
    with pytest.raises(ModelError, match=rf"its {INDEX} cannot be read"):
        open_checkpoint(str(directory))


def test_a_tensor_in_two_shards_is_refused(originals: Path, tmp_path: Path) -> None:
    directory = copy(originals, "shards", tmp_path)
    first, second = sorted(directory.glob("model-*"))[:2]
    tensors = load_file(second)
    name = next(iter(load_file(first)))
    save_file(tensors | {name: torch.zeros(32)}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"both {first.name} and {second.name} have the tensor {name}"):
        open_checkpoint(str(directory))


# Weights that are none


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, "is a pointer of Git LFS, not the weights; run git lfs pull"), (b"", "is empty; download or save")],
)
def test_a_file_without_weights_is_refused(
    form: str, content: bytes, message: str, originals: Path, tmp_path: Path
) -> None:
    directory = copy(originals, form, tmp_path)
    file = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])[-1]
    file.write_bytes(content)
    with pytest.raises(ModelError, match=f"{file.name} {message}"):
        open_checkpoint(str(directory))


def test_a_file_that_was_cut_off_is_refused(originals: Path, tmp_path: Path) -> None:
    for form in FORMS:
        directory = copy(originals, form, tmp_path)
        file = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])[-1]
        os.truncate(file, file.stat().st_size - 100)
        with pytest.raises(ModelError, match="transformers cannot load it") as raised:
            open_checkpoint(str(directory)).load("float32", CPU)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.safetensors", "adapter_model.safetensors"])
def test_a_directory_of_other_weights_says_what_lies_there(name: str, originals: Path, tmp_path: Path) -> None:
    shutil.copy(originals / "whole" / "config.json", tmp_path)
    save_file({NORM: torch.zeros(32)}, tmp_path / name)
    with pytest.raises(ModelError, match=rf"found no weights; expected one of model\.safetensors, .*; found {name}$"):
        open_checkpoint(str(tmp_path))


def test_a_file_is_no_checkpoint(originals: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors: it is a file; expected a .* directory"):
        open_checkpoint(str(originals / "whole" / "model.safetensors"))


# Code of the repository


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}},
        {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
        {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "own.OwnModel"}},
    ],
    ids=["configuration and model", "configuration", "model"],
)
def test_an_architecture_that_needs_code_of_its_repository_is_refused_without_a_question(
    values: dict[str, Any], originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asks the user"))
    directory = copy(originals, "whole", tmp_path)
    edit(directory / "config.json", architectures=["OwnModel"], **values)
    (directory / "own.py").write_text(CODE)
    with pytest.raises(ModelError, match="OwnModel needs code from its repository, which can do all that you can"):
        open_checkpoint(str(directory)).load("float32", CPU)
    assert not (directory / "ran").exists()


def test_an_architecture_that_transformers_has_is_loaded_without_the_code_beside_it(
    originals: Path, tmp_path: Path
) -> None:
    directory = copy(originals, "whole", tmp_path)
    edit(directory / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"})
    (directory / "own.py").write_text(CODE)
    model = open_checkpoint(str(directory)).load("float32", CPU)
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(originals / "whole"))
    assert not (directory / "ran").exists()

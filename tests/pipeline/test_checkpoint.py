"""Checkpoints are found, identified by their weights, and refused with what is wrong."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel, Models

from adpa.errors import ModelError
from adpa.pipeline.checkpoint import open_checkpoint, resolve_device


def test_the_identity_follows_the_weights_and_not_the_place(models: Models, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(models.teacher, moved)
    original, copy = open_checkpoint(str(models.teacher)).identity, open_checkpoint(str(moved)).identity
    assert copy.digest == original.digest
    assert copy.name == str(moved)
    assert open_checkpoint(str(models.reference)).identity.digest != original.digest


def test_one_changed_bit_of_the_weights_is_another_model(models: Models, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(models.teacher, changed)
    weights = changed / "model.safetensors"
    payload = bytearray(weights.read_bytes())
    payload[-1] ^= 1
    weights.write_bytes(payload)
    assert open_checkpoint(str(changed)).identity.digest != open_checkpoint(str(models.teacher)).identity.digest


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
    assert checkpoint.load("float32", torch.device("cpu")).dtype == torch.float32


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
        open_checkpoint(str(broken)).load("float32", torch.device("cpu"))


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
            open_checkpoint(str(broken)).load("float32", torch.device("cpu"))


def test_a_configuration_that_cannot_be_read_is_refused(models: Models, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models.teacher, broken)
    (broken / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        _ = open_checkpoint(str(broken)).config


def test_a_token_without_an_embedding_is_refused(models: Models) -> None:
    checkpoint = open_checkpoint(str(models.teacher))
    checkpoint.check_ids(49151)
    with pytest.raises(ModelError, match=r"token id 49152; the model has 49152 embeddings"):
        checkpoint.check_ids(49152)


def test_more_tokens_than_positions_are_refused(models: Models) -> None:
    checkpoint = open_checkpoint(str(models.teacher))
    checkpoint.check_positions(2048)
    with pytest.raises(ModelError, match=r"2049 tokens; the model has 2048 positions"):
        checkpoint.check_positions(2049)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda:77", "nonsense"):
        with pytest.raises(ModelError, match=f"--device {device}"):
            resolve_device(device)

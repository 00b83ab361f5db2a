"""Merged weights in a temporary directory: they are the adapter's, need room, and are gone after use."""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig
from tests.pipeline.models.adapters import CPU, LORA, logits, save_adapter

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.models.lm_head import hidden_states, read_head
from adpa.pipeline.models.merged_weights import merged_weights

HEADS: dict[str, Callable[[], PeftConfig]] = {
    "the base's": lambda: LoraConfig(**LORA),
    "its own": lambda: LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "changed": lambda: LoraConfig(r=2, target_modules=["lm_head", "embed_tokens"]),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def never(*_: object, **__: object) -> None:
    raise AssertionError("nothing may be loaded")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_those_of_the_merged_model_while_they_are_used(
    dtype: str, adapter: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint: Checkpoint = pickle.loads(pickle.dumps(open_checkpoint(str(adapter))))
    with caplog.at_level(logging.WARNING), merged_weights(checkpoint, dtype) as whole:
        assert whole.directory.parent == place
        assert f"{adapter}: its merged weights take 0.0 GB in {whole.directory}" in caplog.text
        assert (whole.name, whole.adapter, whole.is_quantized) == (checkpoint.name, None, False)
        assert whole.config.dtype == getattr(torch, dtype)
        assert torch.equal(logits(whole.load(dtype, CPU)), logits(checkpoint.load(dtype, CPU)))
        with merged_weights(whole, dtype) as same:
            assert same is whole
    assert not list(place.iterdir())


def test_whole_weights_stay_where_they_are(base: Path, place: Path) -> None:
    checkpoint = open_checkpoint(str(base))
    with merged_weights(checkpoint, "bfloat16") as whole:
        assert whole is checkpoint
    assert (base / "model.safetensors").exists()
    assert not list(place.iterdir())


@pytest.mark.parametrize("error", [ModelError("x"), KeyboardInterrupt(), torch.OutOfMemoryError()], ids=repr)
def test_they_are_removed_after_an_error_too(error: BaseException, adapter: Path, place: Path) -> None:
    with pytest.raises(type(error)), merged_weights(open_checkpoint(str(adapter)), "float32"):
        raise error
    assert not list(place.iterdir())


@pytest.mark.slow
def test_they_are_removed_when_the_process_ends(adapter: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from adpa.pipeline.models.checkpoint import open_checkpoint as o\n"
        "from adpa.pipeline.models.merged_weights import merged_weights as m\n"
        "with m(o(sys.argv[1]), 'float32') as whole: print(whole.directory); sys.exit(3)"
    )
    command = [sys.executable, "-c", code, str(adapter)]
    ended = subprocess.run(command, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    assert Path(ended.stdout.splitlines()[-1]).parent == tmp_path
    assert not list(tmp_path.glob("adpa-merged-*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_too_little_room_on_the_disk_is_said_before_anything_is_loaded(
    dtype: str, adapter: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(adapter))
    needed = checkpoint.weight_bytes(dtype)
    room = SimpleNamespace(free=needed)
    monkeypatch.setattr("shutil.disk_usage", lambda path: {str(place): room}[path])
    with merged_weights(checkpoint, dtype) as whole:
        assert whole.directory.parent == place
    room.free = needed - 1
    monkeypatch.setattr(Checkpoint, "load", never)
    expected = rf"weights take about 0\.0 GB in {dtype}; {place} has 0\.0 GB free; set TMPDIR to a directory with room"
    with pytest.raises(ModelError, match=expected), merged_weights(checkpoint, dtype):
        pass
    assert not list(place.iterdir())


def test_too_little_memory_is_said_before_anything_is_loaded(
    adapter: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(adapter))
    room = checkpoint.weight_bytes("float32") - 1
    monkeypatch.setattr("adpa.pipeline.models.merged_weights.device_memory", lambda device: room)
    with merged_weights(checkpoint, "bfloat16"):
        pass
    monkeypatch.setattr(Checkpoint, "load", never)
    expected = r"weights take about .* in float32; there is room for .*; merge it on a machine with more memory"
    with pytest.raises(ModelError, match=expected), merged_weights(checkpoint, "float32"):
        pass
    assert not list(place.iterdir())


def test_a_disk_that_fills_up_meanwhile_is_said_in_one_line(
    adapter: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_pretrained(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", save_pretrained)
    expected = r"weights, 0\.0 GB, cannot be written: .*No space left on device; set TMPDIR"
    with pytest.raises(ModelError, match=expected), merged_weights(open_checkpoint(str(adapter)), "float16"):
        pass
    assert not list(place.iterdir())


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_alone_is_that_of_the_merged_model(kind: str, dtype: str, base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_adapter(base, tmp_path, HEADS[kind]())))
    model = checkpoint.load(dtype, CPU).eval()
    with merged_weights(checkpoint, dtype) as whole:
        head = whole.load_head(dtype, CPU)
    assert torch.equal(head.weight, read_head(model).weight)
    if dtype == "float32":
        ids = torch.randint(3, 96, (2, 5))
        with torch.no_grad():
            assert torch.equal(
                head.logits(hidden_states(model, ids, torch.ones_like(ids))), model(input_ids=ids).logits
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_is_never_merged_in_another_dtype_than_its_model(dtype: str, adapter: Path) -> None:
    with pytest.raises(AssertionError, match="the head of an adapter is that of its merged weights"):
        open_checkpoint(str(adapter)).load_head(dtype, CPU)

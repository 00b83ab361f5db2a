"""Strange values in the JSON files of a checkpoint are refused in one line; directories are no files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.pipeline.conftest import SMALL, save_random
from tests.pipeline.models.adapters import CPU, digest, edit
from transformers import LlamaConfig

from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import open_checkpoint


@pytest.mark.parametrize("content", ["[1, 2]", "null", '""', "5", "{", ""])
def test_generation_settings_that_are_no_object_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    checkpoint = save_random(LlamaConfig(**SMALL), tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"its generation_config\.json cannot be read: ") as raised:
        checkpoint.eos_token_ids  # noqa: B018
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "others", [{"watermarking_config": 5}, {"cache_implementation": []}, {"num_beams": "x"}], ids=str
)
def test_other_generation_settings_do_not_matter(others: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = save_random(LlamaConfig(**SMALL), tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]} | others))
    assert checkpoint.eos_token_ids == (7, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": "a"}, "Field 'vocab_size' expected int, got str"),
        ({"eos_token_id": "x"}, "Field 'eos_token_id' with value 'x' doesn't match"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int"),
        ({"hidden_size": 33}, r"The hidden size \(33\) is not a multiple"),
        ({"num_attention_heads": 0}, "by zero"),
        ({"layer_types": 5}, "not iterable"),
        ({"id2label": 5}, "no attribute"),
        ({"model_type": ["llama"]}, "unhashable"),
    ],
    ids=str,
)
def test_a_configuration_with_strange_values_is_refused_in_one_line(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_random(LlamaConfig(**SMALL), tmp_path)
    edit(tmp_path / "config.json", **values)
    for use in (
        lambda one: one.config,
        lambda one: one.load("float32", CPU),
        lambda one: one.load_head("float32", CPU),
    ):
        with pytest.raises(ModelError, match=rf"its config\.json cannot be read: .*{message}") as raised:
            use(open_checkpoint(str(tmp_path)))
        assert "\n" not in str(raised.value)


def test_a_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    save_random(LlamaConfig(**SMALL), tmp_path)
    edit(tmp_path / "config.json", dtype=5)
    with pytest.raises(ModelError, match=r"found dtype 5 in its config\.json; expected a dtype such as bfloat16"):
        open_checkpoint(str(tmp_path)).dtype_name("auto")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"transformers_weights": ["a"]},
            r"found transformers_weights \['a'\] in its config\.json; expected a file name",
        ),
        ({"transformers_weights": 5}, "found transformers_weights 5 in"),
        ({"transformers_weights": {}}, r"found transformers_weights \{\} in"),
        ({"configuration_files": 5}, r"found configuration_files 5 in its config\.json; expected file names"),
        ({"configuration_files": [5]}, r"found configuration_files \[5\] in"),
        ({"configuration_files": "a"}, "found configuration_files 'a' in"),
    ],
    ids=str,
)
def test_a_configuration_that_names_no_files_is_refused_in_one_line(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = save_random(LlamaConfig(**SMALL), tmp_path).directory
    edit(directory / "config.json", **values)
    with pytest.raises(ModelError, match=message) as raised:
        digest(directory)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["x_quant_config.json", "sub.safetensors", "model-1.safetensors", "other.bin"])
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_a_directory_is_no_file(name: str, form: str, tmp_path: Path) -> None:
    directory = save_random(LlamaConfig(**SMALL), tmp_path).directory
    if form.endswith("bin"):
        torch.save(load_file(directory / "model.safetensors"), directory / form)
        (directory / "model.safetensors").unlink()
    expected = digest(directory)
    (directory / name).mkdir()
    assert digest(directory) == expected
    assert not open_checkpoint(str(directory)).is_quantized

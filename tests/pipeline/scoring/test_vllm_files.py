"""The files that a real vLLM loads are those that adpa digests; an adapter is loaded merged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import MakeModel
from tests.pipeline.conftest import synthetic
from tests.pipeline.models.adapters import save_adapter

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import Scoring
from adpa.errors import ModelError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.models.weight_files import _files_of_vllm, weight_files
from adpa.pipeline.scoring.engine import HfEngine
from adpa.pipeline.scoring.vllm_engine import open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
QUICK = ("enforce_eager=true", "kv_cache_memory_bytes=67108864")
NORM = "model.norm.weight"
SEQUENCES = [synthetic(range(10, 30), range(40, 60)), synthetic([5, 6, 7], [8, 9])]


@pytest.fixture(scope="module")
def whole(make_model: MakeModel) -> Path:
    return make_model(90, width=128, initializer_range=0.1)


def stray(directory: Path, name: str) -> None:
    weights = {NORM: torch.full([128], 9.0)}
    if name.endswith(".safetensors"):
        save_file(weights, directory / name, metadata={"format": "pt"})
    else:
        torch.save(weights, directory / name)


def in_shards(whole: Path, to: Path) -> Path:
    """The same weights in two files with an index."""
    shutil.copytree(whole, to)
    weights = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[:7], sorted(weights)[7:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, to / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def as_pickle(whole: Path, to: Path) -> Path:
    shutil.copytree(whole, to)
    torch.save(load_file(to / "model.safetensors"), to / "pytorch_model.bin")
    (to / "model.safetensors").unlink()
    return to


MAKE: dict[str, Callable[[Path, Path], Path]] = {
    "whole": lambda whole, to: Path(shutil.copytree(whole, to)),
    "shards": in_shards,
    "pickle": as_pickle,
}


@pytest.mark.parametrize("form", MAKE)
@pytest.mark.parametrize(
    ("beside", "refused"),
    [
        ((), ""),
        (("consolidated.safetensors",), "whole pickle"),
        (("model.safetensors",), "shards"),
        (("pytorch_model.bin",), ""),
        (("training_args.bin", "optimizer.bin"), ""),
        (("other.bin",), "pickle"),
        (("._model.safetensors", "._other.bin", "model.pt"), ""),
        (("model-00009-of-00009.safetensors",), "whole pickle"),
    ],
)
def test_adpa_knows_which_files_vllm_loads(
    form: str, beside: tuple[str, ...], refused: str, whole: Path, tmp_path: Path
) -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    directory = MAKE[form](whole, tmp_path / form)
    for name in beside:
        if not (directory / name).exists():
            stray(directory, name)
    loader = DefaultModelLoader(LoadConfig(load_format="hf"))
    _, files, _, _ = loader._prepare_weights(str(directory), None, None, True, None)
    assert sorted(map(Path, files)) == _files_of_vllm("x", directory)
    if form in refused:
        with pytest.raises(ModelError, match="more than one model"):
            weight_files("x", directory)
    else:
        assert sorted(map(Path, files)) == weight_files("x", directory)


def rows_of(model: Path, dtype: str = "float32") -> tuple[list[SignalRow], list[SignalRow]]:
    """A model's signals by vLLM and by transformers."""
    checkpoint = open_checkpoint(str(model))
    scoring = Scoring(checkpoint.identity, None, "v", 10, dtype, "")
    options = VllmOptions(engine_arg=QUICK)
    vllm = open_vllm(options, CPU, {"teacher": checkpoint}, {"teacher": dtype}, "")
    assert vllm.name == "vllm hidden-states"
    rows = []
    for engine in (vllm, HfEngine(CPU, "")):
        scorer = engine.open_scorer(checkpoint, scoring, 40)
        rows.append([row for answered in scorer.top_k([SEQUENCES], 10) for row in answered])
        scorer.close()
    return rows[0], rows[1]


def assert_equal(rows: list[SignalRow], others: list[SignalRow], bound: float = 2e-4) -> None:
    for row, other in zip(rows, others, strict=True):
        np.testing.assert_allclose(row.token_logprobs, other.token_logprobs, atol=bound)
        np.testing.assert_allclose(row.topk_logprobs, other.topk_logprobs, atol=bound)


def test_files_in_mistrals_own_format_are_not_loaded(whole: Path, tmp_path: Path) -> None:
    """vLLM would take them by itself."""
    directory = in_shards(whole, tmp_path / "shards")
    weights = load_file(whole / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, directory / "consolidated.safetensors")
    (directory / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 8192}))
    rows, expected = rows_of(directory)
    assert_equal(rows, expected)
    plain = open_checkpoint(str(in_shards(whole, tmp_path / "plain")))
    assert open_checkpoint(str(directory)).identity.digest == plain.identity.digest


def test_pickles_are_loaded(whole: Path, tmp_path: Path) -> None:
    rows, expected = rows_of(as_pickle(whole, tmp_path / "pickle"))
    assert_equal(rows, expected)


def test_an_adapter_has_the_signals_of_transformers_and_not_those_of_its_base(whole: Path, tmp_path: Path) -> None:
    adapter = save_adapter(whole, tmp_path / "adapter")
    rows, expected = rows_of(adapter)
    assert_equal(rows, expected)
    of_base = HfEngine(CPU, "").open_scorer(
        open_checkpoint(str(whole)), Scoring(open_checkpoint(str(whole)).identity, None, "v", 10, "float32", ""), 40
    )
    (others,) = of_base.top_k([SEQUENCES], 10)
    assert max(np.abs(a.token_logprobs - b.token_logprobs).max() for a, b in zip(rows, others, strict=True)) > 0.01


def test_layers_of_sentence_transformers_are_refused(whole: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "whole"))
    modules = [{"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"vLLM would add the dense layers of modules\.json to it"):
        rows_of(directory)

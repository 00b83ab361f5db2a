"""--attn-implementation: which names there are, what they need, and that the models compute with them."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import Row
from tests.pipeline.conftest import Filled
from transformers import AutoModelForCausalLM
from transformers.integrations.hub_kernels import is_kernel
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from adpa import distill, precompute
from adpa.data.cache.signals import read_scoring, read_signals
from adpa.errors import ModelError, OptionError
from adpa.pipeline.models.attention import ATTENTIONS, KERNEL, PACKAGES, check_attention, check_place, switch_attention
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.scoring.request import EngineOptions
from adpa.pipeline.scoring.vllm_options import VllmOptions

CPU = torch.device("cpu")


def test_the_names_are_those_of_transformers() -> None:
    of_transformers = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if not name.startswith(("adpa", "paged"))}
    assert set(ATTENTIONS) == {"eager"} | of_transformers
    assert {f"flash_attention_{number}" for number in FLASH_ATTENTION_COMPATIBILITY_MATRIX} == set(PACKAGES)
    for name in ("org/kernel", "org/kernel@v1", "org/kernel:function", "org", "org/a/b", "sdpa", "paged|sdpa"):
        assert bool(KERNEL.fullmatch(name)) == is_kernel(name), name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("flash-attention-2", "did you mean flash_attention_2?"),
        ("SDPA", "did you mean sdpa?"),
        ("eagre", "did you mean eager?"),
        ("xformers", ""),
        ("paged|eager", "did you mean eager?"),
    ],
)
def test_another_name_is_refused(name: str, meant: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_attention(name)
    problem, fix = caught.value.args
    assert problem == (
        f"--attn-implementation {name}; expected one of eager, sdpa, flex_attention, flash_attention_2, "
        "flash_attention_3, flash_attention_4, or a kernel of the Hub such as kernels-community/flash-attn2"
    )
    assert fix == meant


@pytest.mark.parametrize(
    ("name", "installed", "message"),
    [
        ("flash_attention_2", "", "needs flash-attn, which is not installed; pip install flash-attn, or kernels, with"),
        ("flash_attention_3", "flash-attn", "needs flash-attn-3, which is not installed"),
        ("flash_attention_4", "", "needs flash-attn-4, which is not installed"),
        ("kernels-community/flash-attn2", "flash-attn", "needs kernels, which is not installed; pip install kernels"),
        ("flash_attention_2", "flash-attn", None),
        ("flash_attention_3", "kernels", None),
        ("kernels-community/flash-attn2", "kernels", None),
        ("eager", "", None),
        ("flex_attention", "", None),
    ],
)
def test_its_package_must_be_there(
    name: str, installed: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if package != installed:
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("adpa.pipeline.models.attention.version", version)
    if message is None:
        check_attention(name)
        return
    with pytest.raises(OptionError, match=f"--attn-implementation {name} {message}"):
        check_attention(name)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("flash_attention_2", "cpu", "bfloat16", "needs a GPU, and the device is cpu; use sdpa or eager"),
        ("flex_attention", "cpu", "float32", "needs a GPU"),
        ("flash_attention_3", "cuda", "float32", "computes in 16 bits, and the dtype is float32; use --dtype bfloat16"),
        ("flash_attention_2", "cuda", "float16", None),
        ("flex_attention", "cuda", "float32", None),
        ("eager", "cpu", "float32", None),
        (None, "cpu", "float32", None),
    ],
)
def test_its_device_and_dtype_must_fit(name: str | None, device: str, dtype: str, message: str | None) -> None:
    if message is None:
        check_place(name, device, dtype)
        return
    with pytest.raises(OptionError, match=message):
        check_place(name, device, dtype)


def test_vllm_has_its_own() -> None:
    options = EngineOptions("vllm", VllmOptions(), None, "auto", "auto", attn_implementation="eager")
    with pytest.raises(OptionError) as caught:
        options.check()
    assert str(caught.value) == (
        "--attn-implementation eager is for transformers; the engine is vllm (as asked); use --engine hf, or vLLM's "
        "own: --engine-arg attention_backend=FLASH_ATTN"
    )


def test_packing_takes_only_what_it_can_cut_into_sequences(tmp_path: Path) -> None:
    options: dict[str, Any] = {"packing": "prompts", "attn_implementation": "flex_attention"}
    with pytest.raises(OptionError, match="--packing prompts with --attn-implementation flex_attention: it takes sdpa"):
        distill("sft", "student", tmp_path, tmp_path / "out", **options)


def test_a_model_that_cannot_be_computed_with_it_is_refused(few_words: Filled) -> None:
    model = open_checkpoint(str(few_words.models.student)).load("float32", CPU)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM: no --attn-implementation flash_attention_2: .*; use sdpa or eager"
    ):
        switch_attention(model, "flash_attention_2")
    with pytest.raises(ModelError, match="transformers cannot load it with --attn-implementation flash_attention_2: "):
        open_checkpoint(str(few_words.models.student), attn_implementation="flash_attention_2").load("float32", CPU)
    switch_attention(model, "eager")
    assert model.config._attn_implementation == "eager"


@pytest.fixture
def eager_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every layer that is computed by eager attention."""
    calls: list[int] = []
    eager = modeling_llama.eager_attention_forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return eager(*arguments, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    return calls


def score(teacher: Path, data: Path, cache: Path, attention: str | None) -> dict[bytes, tuple[Any, ...]]:
    """The token ids and log-probabilities of every signal row."""
    report = precompute(str(teacher), str(data), cache, top_k=4, attn_implementation=attention)
    signals = read_signals(cache, read_scoring(cache, report.scoring))
    rows = (signals.row(number) for number in range(len(signals)))
    return {row.key: (row.topk_ids, row.token_logprobs) for row in rows}


def test_scoring_computes_with_it(eager_calls: list[int], few_words: Filled, tmp_path: Path) -> None:
    teacher, data = few_words.models.teacher, few_words.data
    by_sdpa = score(teacher, data, tmp_path / "sdpa", "sdpa")
    assert not eager_calls
    by_eager = score(teacher, data, tmp_path / "eager", "eager")
    assert eager_calls
    for key, (ids, logprobs) in by_sdpa.items():
        np.testing.assert_array_equal(by_eager[key][0], ids)
        np.testing.assert_allclose(by_eager[key][1], logprobs, atol=1e-2)  # float16


def test_two_attentions_share_their_signals(few_words: Filled, tmp_path: Path) -> None:
    """They differ by rounding alone, as two devices do."""
    ask: dict[str, Any] = {"teacher": str(few_words.models.teacher), "data": str(few_words.data), "cache": tmp_path}
    by_sdpa, by_eager = precompute(**ask, attn_implementation="sdpa"), precompute(**ask, attn_implementation="eager")
    assert by_sdpa.scoring == by_eager.scoring
    assert by_eager.scored == 0


@pytest.mark.parametrize("packing", ["none", pytest.param("prompts", marks=pytest.mark.slow)])
def test_training_computes_with_it_and_records_it(
    packing: Any, eager_calls: list[int], few_words: Filled, tmp_path: Path
) -> None:
    ask: dict[str, Any] = {
        "objective": "dckd",
        "student": str(few_words.models.student),
        "cache": few_words.cache,
        "max_steps": 2,
        "batch_size": 4,
    }
    by_default = distill(**ask, output=tmp_path / "default", packing=packing)
    assert not eager_calls
    by_eager = distill(**ask, output=tmp_path / "eager", packing=packing, attn_implementation="eager")
    assert eager_calls
    assert by_eager.last_loss == pytest.approx(by_default.last_loss, rel=1e-5)
    records = [json.loads((tmp_path / name / "adpa.json").read_text()) for name in ("default", "eager")]
    assert [record["attn_implementation"] for record in records] == ["sdpa", "eager"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "eager")
    assert saved.config._attn_implementation == "sdpa"  # the next program chooses for itself


@pytest.mark.slow
def test_real_signals_by_eager_are_those_by_sdpa(
    smollm2: Path, eager_calls: list[int], preference_rows: list[Row], tmp_path: Path
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:4]))
    by_sdpa = score(smollm2, data, tmp_path / "sdpa", None)
    assert not eager_calls
    by_eager = score(smollm2, data, tmp_path / "eager", "eager")
    assert len(eager_calls) >= 30  # layers
    assert by_sdpa.keys() == by_eager.keys()
    for key, (ids, logprobs) in by_sdpa.items():
        assert (by_eager[key][0] == ids).mean() > 0.99
        np.testing.assert_allclose(by_eager[key][1], logprobs, atol=2e-2)

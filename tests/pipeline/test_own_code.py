"""Both stages with models and a tokenizer that need code from their repositories."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipeline.conftest import Filled
from tests.pipeline.models.adapters import save_adapter
from tests.pipeline.own_code import edit_json, with_own_code, with_own_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from adpa import distill, evaluate, inspect_cache, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signals import read_scoring, read_signals
from adpa.data.cache.tokenizers import check_tokenizer, copy_tokenizer
from adpa.errors import ModelError, RemoteCodeError
from adpa.pipeline.cache.verify import verify_cache

ROLES = ("teacher", "reference", "student")


@pytest.fixture(scope="module")
def own(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Teacher, reference and student: each its own weights, and the same code."""
    folder = tmp_path_factory.mktemp("own")
    return {role: str(with_own_code(getattr(few_words.models, role), folder / role)) for role in ROLES}


@pytest.fixture(scope="module")
def cache(own: dict[str, str], few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    precompute(own["teacher"], str(few_words.data), cache, reference=own["reference"], top_k=8, trust_remote_code=True)
    return cache


def test_the_signals_are_those_of_the_code(cache: Path, own: dict[str, str]) -> None:
    scoring = read_scoring(cache, next((cache / "scorings").iterdir()).name)
    signals = read_signals(cache, scoring)
    sequence = next(one for one in read_response_sets(cache) if one.info.name == "chosen").sequences()[0]
    row = signals.row(int(signals.locate([sequence.key])[0]))
    assert row.token_advantages is not None
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()[None]
    with torch.no_grad():
        logprobs = [
            AutoModelForCausalLM.from_pretrained(own[role], trust_remote_code=True)(ids).logits[0].log_softmax(-1)
            for role in ("teacher", "reference")
        ]
    rows = range(len(sequence.prompt_ids) - 1, ids.shape[1] - 1)
    of_teacher, of_reference = (each[rows, sequence.response_ids].numpy() for each in logprobs)
    np.testing.assert_allclose(row.token_logprobs, of_teacher, atol=1e-4)
    np.testing.assert_allclose(row.token_advantages, of_teacher - of_reference, atol=1e-4)


@pytest.mark.parametrize(
    "adapters",
    [{}, pytest.param({"lora_rank": 2, "lora_dropout": 0.1}, marks=pytest.mark.slow)],
    ids=["whole", "lora"],
)
def test_the_trained_student_has_its_code_and_loads(
    adapters: dict[str, Any], cache: Path, own: dict[str, str], tmp_path: Path
) -> None:
    distill(
        "dckd", own["student"], cache, tmp_path, max_steps=2, batch_size=4, learning_rate=0.1, trust_remote_code=True,
        **adapters,
    )  # fmt: skip
    for file in ("configuration_own.py", "modeling_own.py"):
        assert (tmp_path / file).read_text() == (Path(own["student"]) / file).read_text()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    before = AutoModelForCausalLM.from_pretrained(own["student"], trust_remote_code=True)
    assert [type(trained).__name__, type(trained.model).__name__] == ["OwnForCausalLM", "OwnModel"]
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(trained.get_parameter(weight), before.get_parameter(weight))


def test_a_student_whose_code_may_not_run_is_refused(cache: Path, own: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"OwnForCausalLM needs code .*; read it, then add --trust-remote-code$"):
        distill("dckd", own["student"], cache, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_models_with_code_are_compared(own: dict[str, str], few_words: Filled, tmp_path: Path) -> None:
    other = with_own_code(few_words.models.reference, tmp_path / "other")
    report = evaluate(
        own["student"], str(other), own["teacher"], own["reference"], str(few_words.data), max_new_tokens=4,
        trust_remote_code=True,
    )  # fmt: skip
    assert report.sampled == 2 * report.prompts


@pytest.mark.slow
def test_an_adapter_of_a_model_with_code_is_merged_into_it(
    own: dict[str, str], few_words: Filled, cache: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(few_words.models.student, tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=own["student"])
    distill("dckd", str(adapter), cache, tmp_path / "out", max_steps=1, trust_remote_code=True)
    assert (tmp_path / "out" / "modeling_own.py").is_file()


# A tokenizer


@pytest.fixture(scope="module")
def with_tokenizers(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {role: str(with_own_tokenizer(getattr(few_words.models, role), folder / role)) for role in ROLES}


@pytest.fixture(scope="module")
def words_cache(with_tokenizers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    rows = [{"prompt": "Say hello", "chosen": "Hello there .", "rejected": "Four"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models: dict[str, Any] = {role: with_tokenizers[role] for role in ("teacher", "reference")}
    precompute(data=str(folder / "pairs.jsonl"), cache=folder / "cache", top_k=4, trust_remote_code=True, **models)
    return folder / "cache"


def test_the_cache_keeps_the_code_of_a_tokenizer_and_distill_reads_it_back(
    words_cache: Path, with_tokenizers: dict[str, str], tmp_path: Path
) -> None:
    (kept,) = (words_cache / "tokenizers").glob("*/tokenization_own.py")
    assert kept.read_text() == (Path(with_tokenizers["teacher"]) / "tokenization_own.py").read_text()
    with pytest.raises(RemoteCodeError) as caught:
        distill("kd", with_tokenizers["student"], words_cache, tmp_path / "out")
    assert str(caught.value) == (
        f"{kept.parent}: the tokenizer needs code from its repository, which can do all that you can; "
        "read it, then add --trust-remote-code"
    )
    distill("kd", with_tokenizers["student"], words_cache, tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer("Hello there .")["input_ids"] == [tokenizer.words[word] for word in ("Hello", "there", ".")]


def test_the_code_is_part_of_a_tokenizers_digest(
    words_cache: Path, with_tokenizers: dict[str, str], tmp_path: Path
) -> None:
    teacher = shutil.copytree(with_tokenizers["teacher"], tmp_path / "teacher")
    code = (teacher / "tokenization_own.py").read_text()
    (teacher / "tokenization_own.py").write_text(code.replace("Words with", "Other words with"))
    data = str(words_cache.parent / "pairs.jsonl")
    report = precompute(str(teacher), data, tmp_path / "cache", trust_remote_code=True, dry_run=True)
    (set_before,) = [one for one in read_response_sets(words_cache) if one.info.name == "chosen"]
    assert report.responses.get("chosen") != set_before.id


def test_inspect_runs_it_if_allowed_and_verify_and_merge_never_do(words_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoteCodeError, match="read it, then add --trust-remote-code"):
        inspect_cache(words_cache, response_set="chosen")
    report = inspect_cache(words_cache, response_set="chosen", trust_remote_code=True)
    assert len(report.responses) == 1
    assert verify_cache(words_cache).faults == []
    (digest,) = (path.name for path in (words_cache / "tokenizers").iterdir())
    copy_tokenizer(words_cache, tmp_path, digest)
    assert check_tokenizer(tmp_path, digest) is None
    files, copied = ({path.name: path.read_bytes() for path in (folder / "tokenizers" / digest).iterdir()}
                     for folder in (words_cache, tmp_path))  # fmt: skip
    assert copied == files

"""Stage two as its users see it: a trained student that loads anywhere, its record, and what is refused."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import MakeModel, Models, Row, WriteRows, swap_two_tokens
from tests.pipeline.conftest import Filled
from transformers import AutoModelForCausalLM, AutoTokenizer

from adpa import distill, precompute
from adpa.data.cache.signals import read_scorings
from adpa.data.chat_template import ChatTemplate
from adpa.errors import AdpaError, CacheError, DamagedFileError, ModelError, OptionError
from adpa.parameters import group_of
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.options import Group

BRIEF: dict[str, Any] = {"batch_size": 4, "max_steps": 12, "learning_rate": 3e-3, "logging_steps": 1}


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("sft", {}),
        ("kd", {}),
        ("dckd", {}),
        ("adpa", {}),
        ("adpa", {"on": "chosen"}),
        ("adpa", {"on": "rejected", "plausibility": 0.01}),
    ],
)
def test_the_loss_of_every_objective_falls(objective: Any, options: Any, filled: Filled, tmp_path: Path) -> None:
    report = distill(objective, str(filled.models.student), filled.cache, tmp_path, **BRIEF, **options)
    losses = [entry["loss"] for entry in json.loads((tmp_path / "adpa.json").read_text())["losses"]]
    assert report.steps == len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert (losses[0], losses[-1]) == (report.first_loss, report.last_loss)


@pytest.fixture(scope="module")
def trained(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    distill("dckd", str(filled.models.student), filled.cache, output, **BRIEF)
    return output


def test_the_output_is_an_ordinary_checkpoint_that_answers(trained: Path, filled: Filled) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    teacher_tokenizer = AutoTokenizer.from_pretrained(filled.models.teacher)
    assert tokenizer.chat_template == teacher_tokenizer.chat_template
    assert tokenizer.get_vocab() == teacher_tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = ChatTemplate(tokenizer).render([{"role": "user", "content": "Say hello."}], add_generation_prompt=True)
    input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    answer = model.generate(input_ids, max_new_tokens=3)  # type: ignore[misc]  # its mixin is typed apart
    assert isinstance(answer, torch.Tensor)
    assert answer.shape[1] > input_ids.shape[1]


def test_the_student_has_moved_towards_the_teacher(trained: Path, filled: Filled) -> None:
    before = AutoModelForCausalLM.from_pretrained(filled.models.student)
    after = AutoModelForCausalLM.from_pretrained(trained)
    moved = [not torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


def test_the_record_says_how_the_student_was_made(trained: Path, filled: Filled) -> None:
    record = json.loads((trained / "adpa.json").read_text())
    (scoring,) = read_scorings(filled.cache)
    assert record["objective"] == "dckd"
    assert record["terms"] == {
        "chosen": {"nll": 1.0, "kl": 1.0, "advantage": 0.0},
        "rejected": {"nll": 0.0, "kl": 1.0, "advantage": 0.0},
    }
    assert record["student"]["digest"] == open_checkpoint(str(filled.models.student)).identity.digest
    assert record["scoring"] == scoring.id
    assert record["responses"].keys() == {"chosen", "rejected"}
    assert record["training"]["batch_size"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert record["losses"][0].keys() >= {"loss", "nll/chosen", "kl/chosen", "kl/rejected", "learning_rate", "step"}


def test_the_four_commands_make_adpa_plus(
    models: Models, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path
) -> None:
    cache, data = tmp_path / "cache", str(write_rows(preference_rows[:6]))
    pair: dict[str, Any] = {"teacher": str(models.teacher), "reference": str(models.reference)}
    precompute(pair["teacher"], data, cache)
    distill("dckd", str(models.student), cache, tmp_path / "dckd", **BRIEF)
    precompute(**pair, student=str(tmp_path / "dckd"), data=data, cache=cache, max_new_tokens=6)
    report = distill("adpa", str(tmp_path / "dckd"), cache, tmp_path / "adpa-plus", **BRIEF)
    assert report.examples == 6
    with pytest.raises(CacheError, match="no sampled responses of this student"):
        distill("adpa", str(models.student), cache, tmp_path / "other", **BRIEF)


def refused(filled: Filled, output: Path, **options: Any) -> pytest.ExceptionInfo[AdpaError]:
    arguments: dict[str, Any] = {
        "objective": "dckd",
        "student": str(filled.models.student),
        "cache": filled.cache,
        "output": output,
    }
    with pytest.raises(AdpaError) as caught:
        distill(**(arguments | BRIEF | options))
    return caught


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo"}, r"objective 'dpo'; expected one of sft, kd, dckd, adpa"),
        ({"on": "praised"}, r"--on 'praised'; expected one of chosen, rejected, sampled"),
        ({"plausibility": 1.5}, r"--plausibility 1.5"),
        ({"packing": "tight"}, r"--packing 'tight'; expected one of none, sequences, prompts"),
        ({"batch_size": 0}, r"--batch-size 0; expected at least 1"),
        ({"micro_batch_size": 0}, r"--micro-batch-size 0; expected at least 1"),
        ({"set": ["save_only_model=true"]}, r"--set save_only_model=true: a run could not resume"),
        ({"set": ["seed=3"]}, r"--set seed=3: --seed says it"),
        ({"set": ["max_steps=0"]}, r"--set max_steps=0: --max-steps says it"),
        ({"set": ["adam_beta1={a: ]"]}, r"--set adam_beta1={a: \]: no YAML: expected the node content, but found"),
        ({"set": ["parallelism_config=x"]}, r"--set parallelism_config=x: fsdp or deepspeed shards a student"),
        (
            {"set": ["eval_strategy=steps"]},
            r"--set eval_strategy=steps: --validation and --eval-steps say when to evaluate",
        ),
        ({"learning_rate": -1.0}, r"--learning-rate -1; expected more than 0"),
        ({"learning_rate": float("nan")}, r"--learning-rate nan; expected more than 0"),
        ({"max_grad_norm": -1.0}, r"--max-grad-norm -1; expected 0 or more"),
        ({"num_train_epochs": float("inf")}, r"--num-train-epochs inf; expected a finite number"),
        ({"batch_size": 4, "micro_batch_size": 3}, r"--micro-batch-size 3 does not divide the 4 examples"),
        ({"set": ["nonsense=1"]}, r"--set nonsense=1: transformers.TrainingArguments has no field 'nonsense'"),
        ({"set": ["optim"]}, r"--set optim; expected key=value"),
        ({"set": ["optim=nonsense"]}, r"--set optim=nonsense: no such value; expected one of adamw_torch, "),
        ({"set": ["fp16=true"]}, r"float16 loses small gradients"),
        ({"kl_weight": -1.0}, r"--kl-weight -1; expected 0 or more"),
        ({"device": "cuda:1"}, r"--device cuda:1"),
        ({"student": "./nowhere"}, r"\./nowhere: no such directory"),
        ({"cache": Path("/nowhere")}, r"/nowhere: no cache there"),
        ({"scoring": "ffff"}, r"--scoring ffff: the cache has none; found "),
        ({"response_set": ["ffff"]}, r"--response-set ffff: the cache has none"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: dict[str, Any], message: str, filled: Filled, tmp_path: Path
) -> None:
    refused(filled, tmp_path / "out", **options).match(message)


def test_an_output_that_is_not_empty_is_refused(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    refused(filled, tmp_path).match("not empty, found notes.txt")


def test_an_output_that_cannot_be_written_is_refused(filled: Filled, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(filled, tmp_path / "file" / "out").match("--output .*file is not a directory")


def test_a_cache_without_the_sets_that_an_objective_needs_is_refused(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    precompute(str(filled.models.teacher), str(filled.data), cache, responses="chosen")
    refused(filled, tmp_path / "out", cache=cache).match("no rejected responses.*--responses rejected")


def test_adpa_on_a_scoring_without_a_reference_is_refused(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    precompute(str(filled.models.teacher), str(filled.data), cache)
    caught = refused(filled, tmp_path / "out", cache=cache, objective="adpa", on="chosen")
    caught.match("has no reference, hence no advantages.*--reference")


def test_several_scorings_that_fit_are_listed_and_one_is_chosen(filled: Filled, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    few = precompute(str(filled.models.teacher), str(filled.data), cache, top_k=5)
    many = precompute(str(filled.models.teacher), str(filled.data), cache, top_k=20)
    refused(filled, tmp_path / "out", cache=cache).match(
        f"(?s)2 combinations.*({few.scoring}|{many.scoring}).*--scoring"
    )
    report = distill("dckd", str(filled.models.student), cache, tmp_path / "chosen", scoring=few.scoring[:6], **BRIEF)
    assert report.scoring == few.scoring


def test_a_student_of_another_vocabulary_is_refused_by_the_token(
    make_model: MakeModel, filled: Filled, tmp_path: Path
) -> None:
    other = make_model(32)
    swap_two_tokens(other)
    refused(filled, tmp_path, student=str(other)).match("the cache's teacher and .* have different vocabularies")


def test_a_student_with_a_padded_vocabulary_is_not_another_one(
    make_model: MakeModel, filled: Filled, tmp_path: Path
) -> None:
    padded = make_model(33, layers=1, vocab_size=49216)
    distill("dckd", str(padded), filled.cache, tmp_path, batch_size=8, max_steps=1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 49216


def test_a_student_with_too_few_embeddings_is_refused(make_model: MakeModel, filled: Filled, tmp_path: Path) -> None:
    caught = refused(filled, tmp_path, student=str(make_model(34, vocab_size=100)))
    assert isinstance(caught.value, ModelError)
    caught.match("the model has 100 embeddings")


def test_damaged_files_of_the_cache_are_refused_by_name(filled: Filled, tmp_path: Path) -> None:
    for number, pattern in enumerate(("scorings/*/signals-*.arrow", "responses/chosen-*.arrow")):
        cache = tmp_path / f"cache-{number}"
        shutil.copytree(filled.cache, cache)
        damaged = sorted(cache.glob(pattern))[0]
        payload = bytearray(damaged.read_bytes())
        payload[len(payload) // 2] ^= 16
        damaged.write_bytes(payload)
        caught = refused(filled, tmp_path / f"out-{number}", cache=cache)
        assert isinstance(caught.value, DamagedFileError)
        caught.match(f"{damaged.name}: damaged")


def test_a_run_does_not_go_on_as_another(filled: Filled, tmp_path: Path) -> None:
    distill("sft", str(filled.models.student), filled.cache, tmp_path, **BRIEF, save_steps=6)
    caught = refused(filled, tmp_path, resume_from_checkpoint="last")
    caught.match("its run has the objective sft; this one has dckd")
    (tmp_path / "adpa.json").unlink()
    refused(filled, tmp_path, resume_from_checkpoint="last").match(r"not empty, found .* and no adpa\.json of its run")


def test_a_launcher_does_not_change_the_precision(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refused(filled, tmp_path / "out").match("the launcher asks for fp16, the options for no; give --bf16")


def test_nothing_is_written_when_the_cache_does_not_fit(filled: Filled, tmp_path: Path) -> None:
    refused(filled, tmp_path / "out", scoring="ffff")
    with pytest.raises(OptionError):
        distill("dckd", str(filled.models.student), filled.cache, tmp_path / "out2", set=["bad"])
    assert not list(tmp_path.iterdir())


MODEL_PACKAGES = ("torch", "transformers", "datasets")


@pytest.mark.parametrize("option", ["learning_rate=-1", "batch_size=0", "lora_rank=0", "packing='x'", "kl_weight=-1"])
def test_a_wrong_value_is_refused_before_a_model_package_is_imported(option: str) -> None:
    call = f"""
import sys
from pathlib import Path
from adpa.errors import OptionError
from adpa.pipeline.distill import distill
def imported():
    return [name for name in {MODEL_PACKAGES} if name in sys.modules]
assert not imported(), imported()
try:
    distill("kd", "student", Path("cache"), Path("out"), {option})
except OptionError as error:
    print(error)
assert not imported(), imported()
"""
    process = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert process.stdout.startswith(f"--{option.partition('=')[0].replace('_', '-')} ")


def test_the_command_refuses_a_wrong_value_before_a_model_package_is_imported() -> None:
    words = "adpa distill --objective kd --student s --cache c --output o --learning-rate -1"
    call = f"""
import sys
from adpa import cli
sys.argv = "{words}".split()
try:
    cli.main()
except SystemExit as end:
    print(end.code, [name for name in {MODEL_PACKAGES} if name in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert process.stderr == "adpa: --learning-rate -1; expected more than 0\n"
    assert process.stdout == "2 []\n"


def test_the_options_that_must_be_decided_are_those_without_a_default() -> None:
    parameters = inspect.signature(distill).parameters.values()
    required = [each for each in parameters if each.default is inspect.Parameter.empty]
    assert [each for each in parameters if group_of(each) is Group.DECIDE] == required

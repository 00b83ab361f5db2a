"""A student may end its answers by any of several tokens: sampled, counted and saved like that."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.conftest import Filled, say_in_order, set_ends
from transformers import AutoModelForCausalLM, AutoTokenizer

from adpa import distill, evaluate, precompute
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.errors import CacheError
from adpa.pipeline.models.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

TURN_END, OTHER, THIRD = 2, 90, 91  # </s>, and two words of the vocabulary
MakeStudent = Callable[[object, int], Path]


@pytest.fixture
def make_student(few_words: Filled, tmp_path: Path) -> MakeStudent:
    """Makes a student that answers "Hello there" and then a token: ``make_student(eos_token_id, token)``."""

    def make(eos_token_id: object, last: int) -> Path:
        directory = tmp_path / "student"
        shutil.copytree(few_words.models.student, directory)
        vocabulary = AutoTokenizer.from_pretrained(directory).get_vocab()
        colon, hello, there = (vocabulary[word] for word in (":", "Hello", "there"))
        say_in_order(open_checkpoint(str(directory)), {colon: hello, hello: there, there: last, last: last})
        set_ends(directory, eos_token_id)
        return directory

    return make


def sample(few_words: Filled, student: Path, cache: Path) -> ResponseSet:
    report = precompute(
        teacher=str(few_words.models.teacher),
        reference=str(few_words.models.reference),
        data=str(few_words.data),
        cache=cache,
        student=str(student),
        max_new_tokens=6,
        top_k=5,
    )
    (sampled,) = (one for one in read_response_sets(cache) if one.info.name == "sampled")
    assert sampled.id == report.responses["sampled"]
    return sampled


def train(student: Path, cache: Path, output: Path, **options: Any) -> Any:
    """Trains for a step that changes next to nothing; returns what the saved settings say of the end."""
    distill("sft", str(student), cache, output, batch_size=4, max_steps=1, learning_rate=1e-9, **options)
    return json.loads((output / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(
    ("eos_token_id", "last", "stops", "saved"),
    [
        ([TURN_END, OTHER], OTHER, (OTHER,), [TURN_END, OTHER]),
        pytest.param([OTHER, TURN_END], TURN_END, (OTHER,), [TURN_END, OTHER], marks=pytest.mark.slow),
        ([THIRD, OTHER], OTHER, (OTHER, THIRD), [TURN_END, THIRD, OTHER]),
        pytest.param(OTHER, OTHER, (OTHER,), [TURN_END, OTHER], marks=pytest.mark.slow),
        ([OTHER, 500, -1, OTHER], OTHER, (OTHER,), [TURN_END, OTHER]),
        pytest.param(TURN_END, TURN_END, (), TURN_END, marks=pytest.mark.slow),
        pytest.param([TURN_END], TURN_END, (), TURN_END, marks=pytest.mark.slow),
        (None, TURN_END, (), TURN_END),
    ],
    ids=str,
)
def test_answers_end_at_any_of_them_and_the_trained_student_keeps_them(
    eos_token_id: object,
    last: int,
    stops: tuple[int, ...],
    saved: object,
    few_words: Filled,
    make_student: MakeStudent,
    tmp_path: Path,
) -> None:
    student = make_student(eos_token_id, last)
    sampled = sample(few_words, student, tmp_path / "cache")
    assert sampled.info.sampling is not None
    assert sampled.info.sampling.stops == stops
    assert sampled.info.truncated_responses == 0
    assert {(len(answer.response_ids), int(answer.response_ids[-1])) for answer in sampled.sequences()} == {(3, last)}
    assert train(student, tmp_path / "cache", tmp_path / "trained") == saved


def test_an_end_that_the_student_does_not_name_does_not_end_an_answer(
    few_words: Filled, make_student: MakeStudent, tmp_path: Path
) -> None:
    sampled = sample(few_words, make_student([TURN_END, THIRD], OTHER), tmp_path / "cache")
    assert sampled.info.truncated_responses == len(sampled.sequences()) == 8
    assert {len(answer.response_ids) for answer in sampled.sequences()} == {6}


@pytest.mark.parametrize("lora", [False, True])
def test_transformers_stops_the_trained_student_at_any_of_them(
    lora: bool, few_words: Filled, make_student: MakeStudent, tmp_path: Path
) -> None:
    student = make_student([THIRD, OTHER], OTHER)
    adapters = {"lora_rank": 2} if lora else {}
    assert train(student, few_words.cache, tmp_path / "trained", **adapters) == [TURN_END, THIRD, OTHER]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    prompt = AutoTokenizer.from_pretrained(student)("assistant :", return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert answer[0, prompt.shape[1] :].tolist()[-1] == OTHER
    assert answer.shape[1] == prompt.shape[1] + 3
    assert isinstance(answer, torch.Tensor)


def test_a_checkpoint_of_an_unfinished_run_has_them(
    few_words: Filled, make_student: MakeStudent, tmp_path: Path
) -> None:
    student, output = make_student([OTHER, THIRD], OTHER), tmp_path / "trained"
    distill("sft", str(student), few_words.cache, output, batch_size=4, max_steps=2, save_steps=1)
    settings = json.loads((output / "checkpoint-1" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [TURN_END, OTHER, THIRD]


def test_a_resumed_run_keeps_them(few_words: Filled, make_student: MakeStudent, tmp_path: Path) -> None:
    student, output = make_student([OTHER, THIRD], OTHER), tmp_path / "trained"
    run: dict[str, Any] = {"objective": "sft", "student": str(student), "cache": few_words.cache, "output": output}
    run |= {"batch_size": 4, "max_steps": 3, "save_steps": 1}
    distill(**run)
    for name in ("model.safetensors", "generation_config.json"):
        (output / name).unlink()
    for later in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(output / later)
    distill(**run, resume_from_checkpoint="last")
    for directory in (output / "checkpoint-1", output / "checkpoint-2", output / "checkpoint-3", output):
        settings = json.loads((directory / "generation_config.json").read_text())
        assert settings["eos_token_id"] == [TURN_END, OTHER, THIRD], directory.name


def test_another_list_makes_new_samples_and_training_asks_which_to_use(
    few_words: Filled, make_student: MakeStudent, tmp_path: Path
) -> None:
    student, cache = make_student(TURN_END, OTHER), tmp_path / "cache"
    before = sample(few_words, student, cache)
    assert before.info.truncated_responses == 8
    set_ends(student, [TURN_END, OTHER])
    common: dict[str, Any] = {"teacher": str(few_words.models.teacher), "reference": str(few_words.models.reference)}
    common |= {"data": str(few_words.data), "cache": cache, "student": str(student), "max_new_tokens": 6, "top_k": 5}
    report = precompute(**common)
    assert (report.sampled, report.truncated_responses) == (8, 0)
    with pytest.raises(CacheError) as caught:
        distill("adpa", str(student), cache, tmp_path / "trained", batch_size=4, max_steps=1)
    first, newer, older = str(caught.value).splitlines()
    assert first.startswith("2 combinations of responses and scoring fit; choose one by the options")
    new = report.responses["sampled"]
    assert f"--response-set sampled-{before.id}" in older
    assert f"--response-set sampled-{new}" in newer
    assert ["ends at 2 or 90" in line for line in (newer, older)] == [True, False]
    chosen = f"sampled-{new}"
    trained = distill(
        "adpa", str(student), cache, tmp_path / "trained", response_set=[chosen], batch_size=4, max_steps=1
    )
    assert trained.responses["sampled"] == new


def test_the_students_other_generation_settings_stay(
    few_words: Filled, make_student: MakeStudent, tmp_path: Path
) -> None:
    student = make_student(OTHER, OTHER)
    path = student / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.3, "top_k": 7}))
    assert train(student, few_words.cache, tmp_path / "trained") == [TURN_END, OTHER]
    settings = json.loads((tmp_path / "trained" / "generation_config.json").read_text())
    assert (settings["do_sample"], settings["temperature"], settings["top_k"]) == (True, 0.3, 7)


def test_an_evaluation_counts_an_answer_with_any_of_them_as_ended(few_words: Filled, make_student: MakeStudent) -> None:
    report = evaluate(
        student=str(make_student([TURN_END, OTHER], OTHER)),
        baseline=str(few_words.models.teacher),
        teacher=str(few_words.models.teacher),
        reference=str(few_words.models.reference),
        data=str(few_words.data),
        max_new_tokens=6,
    )
    assert (report.student.ended, report.student.tokens) == (1.0, 3.0)

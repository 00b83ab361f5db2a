"""What an evaluation leaves beside the student: evaluations.json and a model card that tells it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.conftest import Models, Row, WriteRows
from tests.pipeline.conftest import Filled

from adpa import distill, evaluate
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.training.evaluations import record_evaluation
from adpa.pipeline.training.run_directory import read_evaluations

INTERVAL = {"mean": 0.625, "low": 0.5, "high": 0.75}
ANSWERS = {"implicit_reward": 1.5, "tokens": 20.0, "ended": 1.0}
REPORT = {"student": ANSWERS, "baseline": ANSWERS | {"tokens": 30.0}, "win_rate": INTERVAL, "prompts": 8, "note": "N."}
OPTIONS: dict[str, Any] = {"student": "s", "baseline": "org/b", "teacher": "org/t", "reference": "org/r"}
OPTIONS |= {"data": "org/heldout", "temperature": 1.0, "seed": 0, "device": "cpu", "show": 5, "cache": Path("c")}


@pytest.fixture(scope="module")
def trained(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "student"
    distill("sft", str(filled.models.student), filled.cache, output, batch_size=4, max_steps=1)
    return output


@pytest.fixture
def student(trained: Path, tmp_path: Path) -> Path:
    """A student without its weights, which nothing here reads."""
    for name in ("adpa.json", "README.md"):
        (tmp_path / name).write_text((trained / name).read_text())
    return tmp_path


def test_evaluate_keeps_its_result_with_its_settings(
    trained: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows
) -> None:
    before = open_checkpoint(str(trained)).identity
    data = write_rows(preference_rows[:4], "heldout.jsonl")
    names: dict[str, Any] = {
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "baseline": str(models.other_student),
    }
    report = evaluate(str(trained), data=str(data), max_new_tokens=4, temperature=0.5, **names)
    (entry,) = read_evaluations(trained)
    assert {name: entry["settings"][name] for name in names} == names
    assert (entry["settings"]["data"], entry["settings"]["temperature"]) == (str(data), 0.5)
    assert entry["report"]["win_rate"]["mean"] == report.win_rate.mean
    card = (trained / "README.md").read_text()
    assert f"4 prompts of `heldout.jsonl`, temperature 0.5, seed 0; baseline `{models.other_student.name}`" in card
    assert f"| tokens | {report.student.tokens:.4g} | {report.baseline.tokens:.4g} |" in card
    assert report.note in card
    assert str(data.parent) not in card
    assert ModelCard(card).data.to_dict()["library_name"] == "transformers"
    assert open_checkpoint(str(trained)).identity == before


def test_the_same_settings_replace_a_result_and_others_stand_beside_it(student: Path) -> None:
    record_evaluation(str(student), OPTIONS, REPORT)
    record_evaluation(str(student), OPTIONS | {"temperature": 0.0}, REPORT)
    record_evaluation(str(student), OPTIONS | {"device": "cuda", "show": 0}, REPORT | {"prompts": 9})
    kept = [(each["settings"]["temperature"], each["report"]["prompts"]) for each in read_evaluations(student)]
    assert kept == [(0.0, 8), (1.0, 9)]


def test_a_file_is_the_same_data_from_wherever_it_is_named(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (student / "held.jsonl").write_text("{}")
    monkeypatch.chdir(student)
    for name in ("held.jsonl", "./held.jsonl", str(student / "held.jsonl")):
        record_evaluation(str(student), OPTIONS | {"data": name}, REPORT)
    (entry,) = read_evaluations(student)
    assert entry["settings"]["data"] == str(student / "held.jsonl")


def test_the_card_shows_student_and_baseline_beside_each_other(student: Path) -> None:
    record_evaluation(str(student), OPTIONS, REPORT)
    card = (student / "README.md").read_text()
    assert "8 prompts of `org/heldout`, temperature 1, seed 0; baseline `org/b`, teacher `org/t`" in card
    assert "| win rate | 0.625 [0.5, 0.75] |  |" in card
    assert "| tokens | 20 | 30 |" in card


def test_the_card_has_greedy_answers_and_the_responses_of_the_data_too(student: Path) -> None:
    greedy = {"student": ANSWERS | {"tokens": 12.5}, "baseline": ANSWERS, "win_rate": INTERVAL | {"mean": 0.6875}}
    pairs = {"student_perplexity": 6.25, "baseline_perplexity": 7.5, "reward_accuracy": 0.75, "reward_margin": 0.125}
    record_evaluation(str(student), OPTIONS, REPORT | {"temperature": 1.0, "greedy": greedy} | pairs)
    record_evaluation(str(student), OPTIONS | {"temperature": 0.0}, REPORT | {"temperature": 0.0, "greedy": greedy})
    sampled, alone = (student / "README.md").read_text().split(" prompts of ")[1:]
    assert "| greedy win rate | 0.688 [0.5, 0.75] |  |" in sampled
    assert "| greedy tokens | 12.5 | 20 |" in sampled
    assert "| perplexity of the chosen | 6.25 | 7.5 |" in sampled
    assert "| reward accuracy | 0.75 |  |" in sampled
    assert "| reward margin | 0.125 |  |" in sampled
    assert "| win rate | 0.625 [0.5, 0.75] |  |" in alone
    assert "greedy win rate" not in alone, "all its answers are greedy"


@pytest.mark.parametrize("name", ["org/student", "{here}/plain", "{here}/missing"])
def test_a_model_that_distill_did_not_train_gets_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    record_evaluation(name.format(here=tmp_path), OPTIONS, REPORT)
    assert not list((tmp_path / "plain").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_one_line(student: Path, caplog: pytest.LogCaptureFixture) -> None:
    student.chmod(0o500)
    record_evaluation(str(student), OPTIONS, REPORT)
    student.chmod(0o700)
    assert caplog.messages == [f"{student}: the evaluation is not kept there: Permission denied"]


@pytest.mark.parametrize("written", ['{"a": 1}', "[1]", "[{}]", "{"])
def test_a_damaged_file_is_one_line_and_stays(written: str, student: Path, caplog: pytest.LogCaptureFixture) -> None:
    (student / "evaluations.json").write_text(written)
    record_evaluation(str(student), OPTIONS, REPORT)
    (message,) = caplog.messages
    assert message.startswith(f"{student}: the evaluation is not kept there: ")
    assert (student / "evaluations.json").read_text() == written


def test_a_changed_card_stays_and_the_result_is_kept(student: Path) -> None:
    (student / "README.md").write_text("# Mine\n")
    record_evaluation(str(student), OPTIONS, REPORT)
    assert (student / "README.md").read_text() == "# Mine\n"
    assert json.loads((student / "evaluations.json").read_text())[0]["report"] == REPORT

"""Prompts without responses: a student's answers to them are sampled and scored; two models are compared on them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.conftest import Row, WriteRows
from tests.pipeline.conftest import Filled

from adpa import distill, evaluate, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.errors import CacheError, OptionError, RowError
from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.scoring.first_example import FirstExample
from adpa.pipeline.terminal.precompute import print_example, show_precompute


@pytest.fixture
def options(few_words: Filled, preference_rows: list[Row], write_rows: WriteRows, tmp_path: Path) -> dict[str, Any]:
    """The eight prompts of ``few_words`` without their responses, and a cache of their own."""
    prompts = [{"prompt": row["prompt"]} for row in preference_rows[:8]]
    return {
        "teacher": str(few_words.models.teacher),
        "reference": str(few_words.models.reference),
        "student": str(few_words.models.student),
        "data": str(write_rows(prompts, "prompts.jsonl")),
        "cache": tmp_path / "cache",
        "top_k": 10,
        "samples_per_prompt": 2,
        "max_new_tokens": 6,
    }


def shown(report: PrecomputeReport) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(show_precompute(report))
    return capture.get()


def test_the_students_answers_to_them_are_those_to_the_same_prompts_in_pairs(
    options: dict[str, Any], few_words: Filled
) -> None:
    examples: list[FirstExample] = []
    report = precompute(**options, on_example=examples.append)
    assert (report.rows, report.used, report.identical, report.prompts) == (8, 8, 0, 8)
    assert (report.sampled, report.scored, list(report.responses)) == (16, 16, ["sampled"])
    (alone,) = read_response_sets(options["cache"])
    (paired,) = (one for one in read_response_sets(few_words.cache) if one.info.name == "sampled")
    assert sorted(alone.table["key"].to_pylist()) == sorted(paired.table["key"].to_pylist())
    again = precompute(**options)
    assert (again.sampled, again.scored, again.reused, again.responses) == (0, 0, 16, report.responses)
    assert [(each.chosen, each.end) for each in examples] == [(None, "</s>")]
    assert "prompts alone │ 8" in " ".join(shown(report).split())
    assert "Training needs pairs: every objective has a term on the chosen responses" in shown(report)


def test_the_first_prompt_is_shown_without_a_response(capsys: pytest.CaptureFixture[str]) -> None:
    print_example(FirstExample("user : Say hello", None, "</s>", 2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line.strip("│").split("│")] for line in lines] == [
        ["prompt", "user : Say hello"],
        ["end token", "</s> (id 2)"],
    ]


def test_training_on_them_is_refused_by_what_is_missing(options: dict[str, Any], tmp_path: Path) -> None:
    precompute(**options)
    for objective in ("adpa", "sft"):
        with pytest.raises(CacheError) as caught:
            distill(
                objective=objective, student=options["student"], cache=options["cache"], output=tmp_path / "student"
            )
        assert str(caught.value) == (
            f"{options['cache']}: the cache has no chosen responses; "
            "run the same adpa precompute on preference pairs: its data has prompts alone"
        )


def test_a_probe_needs_a_response(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        precompute(**options, dry_run=True, probe=4)
    assert str(caught.value) == (
        "--probe 4: the data has prompts alone, and the student has sampled no response to them yet; "
        "leave --probe out, or give it preference pairs"
    )
    precompute(**options)
    assert precompute(**options, dry_run=True, probe=4).probe is not None


@pytest.mark.parametrize("responses", [None, "chosen", "rejected", "chosen,sampled"])
def test_other_responses_than_sampled_ones_need_pairs(responses: str | None, options: dict[str, Any]) -> None:
    student = options["student"] if responses and "sampled" in responses else None
    with pytest.raises(RowError) as caught:
        precompute(**options | {"student": student, "responses": responses})
    assert "prompts.jsonl line 1: found the columns prompt; expected `chosen` and `rejected` (first of 8" in str(
        caught.value
    )
    assert str(caught.value).endswith("; prompts alone are enough where only --student answers them")


@pytest.mark.slow
def test_two_models_are_compared_on_them_as_on_pairs(options: dict[str, Any], few_words: Filled) -> None:
    del options["top_k"], options["cache"]
    options["baseline"] = str(few_words.models.reference)
    alone, paired = evaluate(**options), evaluate(**options | {"data": str(few_words.data)})
    assert (alone.prompts, alone.sampled) == (8, 32)
    assert alone.win_rate == paired.win_rate
    for mine, theirs in ((alone.student, paired.student), (alone.baseline, paired.baseline)):
        assert asdict(mine) == pytest.approx(asdict(theirs)), "rounded in another order"

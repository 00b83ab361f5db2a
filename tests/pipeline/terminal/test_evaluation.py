"""The report of an evaluation in a terminal: both models side by side, within 80 columns."""

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from adpa.data.answers import AnswerSummary, Comparison
from adpa.data.bootstrap import Interval
from adpa.data.shown_answers import ShownPrompt
from adpa.pipeline.evaluate import NOTE, EvaluateReport
from adpa.pipeline.terminal.evaluation import show_evaluation

STUDENT = AnswerSummary(-1234.5, -1.25, 312.4, 0.98, 0.031)
BASELINE = AnswerSummary(-2345.6, -2.5, 287.1, 0.875, 0.0123)
SAMPLED: dict[str, Any] = {
    "student": STUDENT,
    "baseline": BASELINE,
    "win_rate": Interval(0.612, 0.581, 0.642),
    "win_rate_per_token": Interval(0.55, 0.51, 0.59),
    "difference": Interval(1111.1, 1000.4, 1222.2),
    "difference_per_token": Interval(1.25, 1.1, 1.4),
}
GREEDY = Comparison(**SAMPLED | {"student": replace(STUDENT, tokens=201.0), "win_rate": Interval(0.7, 0.65, 0.75)})
REPORT = EvaluateReport(
    **SAMPLED,
    prompts=1000,
    repeated_prompts=0,
    truncated_prompts=0,
    thinking_left_out=0,
    dropped=2,
    dropped_by_reason={"empty response": 2},
    sampled=2000,
    scored=4000,
    engine="hf",
    engine_reason="there is no GPU",
    note=NOTE,
    seconds=12.5,
    greedy=GREEDY,
    student_perplexity=6.25,
    baseline_perplexity=7.5,
    reward_accuracy=0.6181,
    reward_margin=1.5,
    reward_pairs=1000,
)


def printed(report: EvaluateReport, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(show_evaluation(report))
    return capture.get().splitlines()


def rows(lines: list[str]) -> list[list[str]]:
    """The cells of every line of a table."""
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_the_numbers_of_both_models_stand_side_by_side() -> None:
    lines = printed(REPORT)
    assert max(map(len, lines)) <= 80
    cells = rows(lines)
    assert ["", "student", "baseline", "student", "baseline"] in cells
    assert ["mean of the answers", "sampled", "sampled", "greedy", "greedy"] in cells
    assert ["implicit reward", "-1,234", "-2,346", "-1,234", "-2,346"] in cells
    assert ["… per token", "-1.25", "-2.5", "-1.25", "-2.5"] in cells
    assert ["tokens", "312.4", "287.1", "201", "287.1"] in cells
    assert ["ended by itself", "0.98", "0.875", "0.98", "0.875"] in cells
    assert ["repetition", "0.031", "0.0123", "0.031", "0.0123"] in cells
    assert ["win rate", "0.612 [0.581, 0.642]", "0.7 [0.65, 0.75]"] in cells
    assert ["reward difference", *["1,111 [1,000, 1,222]"] * 2] in cells
    assert ["perplexity of the chosen", "6.25", "7.5"] in cells


def test_the_students_own_reward_is_told_in_a_sentence_and_the_note_is_last() -> None:
    text = " ".join(" ".join(printed(REPORT)).split())
    assert "prefers the chosen response in 61.8 % of 1,000 pairs, mean margin +1.5 nats." in text
    assert text.endswith(NOTE)
    assert NOTE.endswith("The brackets hold 95 % bootstrap intervals over the prompts.")  # as the tables print them


def test_counts_of_what_did_not_happen_are_left_out() -> None:
    cells = rows(printed(REPORT))
    assert ["prompts", "1,000"] in cells
    assert ["sampled now", "2,000"] in cells
    assert ["engine", "hf; there is no GPU"] in cells
    assert ["scored now", "4,000"] in cells
    assert ["dropped", "2"] in cells
    assert ["dropped by reason", "empty response 2"] in cells
    assert not [row for row in cells if row[0] in ("repeated prompts", "truncated prompts", "thinking left out")]
    assert not [row for row in cells if row[0] == "engine reason"]


def test_at_temperature_0_there_is_one_column_for_each_model() -> None:
    cells = rows(printed(replace(REPORT, temperature=0.0)))
    assert ["mean of the answers", "greedy", "greedy"] in cells
    assert ["tokens", "201", "287.1"] in cells
    assert ["win rate", "0.7 [0.65, 0.75]"] in cells


def test_prompts_alone_are_told_instead_of_perplexity() -> None:
    nothing: dict[str, Any] = {"student_perplexity": None, "baseline_perplexity": None, "reward_accuracy": None}
    text = " ".join(" ".join(printed(replace(REPORT, **nothing))).split())
    assert "The data has prompts alone: perplexity and the student's reward accuracy need chosen and rejected" in text
    assert "perplexity of the chosen" not in text
    assert "prefers the chosen response" not in text


SHOWN = [
    ShownPrompt("Name a prime.", "Seven.\nOr 11.", "Four \x1b[31m.", 1.5, -2.25),
    ShownPrompt("x" * 700, "y" * 1700, "No.", 0.0, 3.0),
]


@pytest.mark.parametrize("width", [99, 80, 60])
def test_answers_stand_one_under_the_other_in_a_narrow_terminal(width: int) -> None:
    lines = printed(replace(REPORT, shown=SHOWN), width)
    assert max(map(len, lines)) <= width
    cells = rows(lines)
    assert lines[0] == "Prompt 1: Name a prime."
    expected = [["student, implicit reward 1.5"], ["Seven."], ["Or 11."], ["baseline, implicit reward -2.25"]]
    assert [row for row in cells if row in expected] == expected
    assert ["Four ␛[31m."] in cells


@pytest.mark.parametrize("width", [100, 120])
def test_answers_stand_side_by_side_in_a_wide_terminal(width: int) -> None:
    lines = printed(replace(REPORT, shown=SHOWN), width)
    assert max(map(len, lines)) <= width
    cells = rows(lines)
    assert ["student, implicit reward 1.5", "baseline, implicit reward -2.25"] in cells
    assert ["Seven.", "Four ␛[31m."] in cells


def test_long_texts_are_cut_and_what_is_cut_is_counted() -> None:
    lines = [line.strip("│ ") for line in printed(replace(REPORT, shown=SHOWN))]
    whole = "".join(lines)
    assert ("x" * 600 in whole, "x" * 601 in whole) == (True, False)
    assert ("y" * 600 in whole, "y" * 601 in whole) == (True, False)
    assert " … 100 more characters" in " ".join(lines)
    assert " … 1,100 more characters" in " ".join(lines)


def test_a_prompt_of_several_messages_is_told_as_such() -> None:
    shown = ShownPrompt("And then?", "Go.", "Stay.", 1.0, 2.0, messages=5)
    assert printed(replace(REPORT, shown=[shown]))[0] == "Prompt 1, the user's last of 5 messages: And then?"

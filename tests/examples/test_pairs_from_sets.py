"""The examples that make pairs from well-known sets run on rows with these sets' own columns."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT

from adpa.data.preferences import parse_pair

Row = dict[str, Any]
Convert = Callable[..., tuple[list[Row], str]]

RATINGS = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Runs an example on rows: ``convert("shp", "comparison_pairs.py", "--set", "shp", rows=[…])`` gives its pairs."""

    def run(example: str, *arguments: str, rows: list[Row]) -> tuple[list[Row], str]:
        folder, output = tmp_path / "set", tmp_path / "pairs.jsonl"
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [sys.executable, f"examples/{example}", *arguments, "--data", str(folder), "--output", str(output)]
        environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        pairs = [json.loads(line) for line in output.read_text().splitlines()]
        for pair in pairs:
            parse_pair("here", pair)
        return pairs, done.stdout.strip()

    return run


def rated(prompt: str, response: str, helpfulness: int) -> Row:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **RATINGS}


@pytest.mark.slow
def test_two_rows_of_helpsteer2_with_one_prompt_are_a_pair(convert: Convert) -> None:
    turns = "c#\n<extra_id_1>Assistant\nWhat about it?\n\nAsk.\n<extra_id_1>User\nIs it <fast>?"
    rows = [
        *(rated("Why?", "Because.", 4), rated("Why?", "No idea.", 1)),
        *(rated(turns, "No.", 0), rated(turns, "Yes.", 3)),
        *(rated("A tie?", "Yes.", 2), rated("A tie?", "No.", 2)),
        rated("Alone?", "Yes.", 4),
    ]
    pairs, said = convert("helpsteer2_pairs.py", rows=rows)
    first, second = pairs
    assert first == {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Because.", "rejected": "No idea."}
    assert second["prompt"] == [
        {"role": "user", "content": "c#"},
        {"role": "assistant", "content": "What about it?\n\nAsk."},
        {"role": "user", "content": "Is it <fast>?"},
    ]
    assert (second["chosen"], second["rejected"]) == ("Yes.", "No.")
    assert said == "pairs: 2, ties left out: 1, prompts without a pair: 1"


PKU = {"prompt": "Why?", "response_0": "No idea.", "response_1": "Because.", "safer_response_id": 0}
SHP = {"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No idea.", "score_A": 40, "score_B": 10}


def completions(*scores: float) -> Row:
    rated = [
        {"model": f"model-{score}", "response": f"Rated {score:g}.", "overall_score": score, "critique": ""}
        for score in scores
    ]
    return {"source": "evol_instruct", "instruction": "Why?", "models": [], "completions": rated}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "responses", "said"),
    [
        (
            "pku-saferlhf",
            [PKU | {"better_response_id": 1}, PKU | {"better_response_id": 0}],
            [("Because.", "No idea."), ("No idea.", "Because.")],
            "pairs: 2, ties left out: 0",
        ),
        (
            "shp",
            [SHP | {"labels": 1}, SHP | {"labels": 0}],
            [("Because.", "No idea."), ("No idea.", "Because.")],
            "pairs: 2, ties left out: 0",
        ),
        (
            "ultrafeedback",
            [completions(7.0, 8.5, 2.0), completions(5.0, 5.0), completions(5.0)],
            [("Rated 8.5.", "Rated 2.")],
            "pairs: 1, ties left out: 2",
        ),
    ],
)
def test_a_set_of_comparisons_becomes_pairs(
    name: str, rows: list[Row], responses: list[tuple[str, str]], said: str, convert: Convert
) -> None:
    pairs, printed = convert("comparison_pairs.py", "--set", name, rows=rows)
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("Why?", *pair) for pair in responses
    ]
    assert printed == said

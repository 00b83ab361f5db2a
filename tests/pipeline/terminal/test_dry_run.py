"""The plan of a run in a terminal: what is trained can be told from what is read, with and without colour."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli
from adpa.pipeline.terminal.dry_run import show_plan
from adpa.pipeline.training.distill_plan import (
    DistillPlan,
    MemoryEstimate,
    Piece,
    PlannedSequence,
    TokenCount,
    TokenCounts,
)

PIECES = [
    Piece("<s>", False, special=True),
    Piece("2 + 2?\n", False),
    Piece("", False, left_out=1200),
    Piece("4", True),
    Piece("", True, left_out=1),
    Piece("</s>", True, special=True),
]
PLAN = DistillPlan(
    objective="adpa",
    output="runs/adpa",
    scoring="5180e23342e76994",
    responses={"chosen": "5b19f7cbacc6214a", "sampled": "c2c3870c6001bd84"},
    data="prefs.jsonl",
    examples=20,
    validation_examples=0,
    steps=7,
    steps_done=2,
    steps_per_epoch=5,
    batch_size=4,
    micro_batch_size=1,
    ranks=2,
    parameters=134_515_008,
    trained_parameters=134_515_008,
    compute_dtype="float32",
    weights_dtype="float32",
    tokens=TokenCounts(TokenCount(70.6, 88, 353), TokenCount(1204.5, 2000, 6022), TokenCount(1300, 2100, 6500)),
    memory=MemoryEstimate(
        538_000_000, 538_000_000, 1_076_000_000, 52_000, 1_000, 2_152_053_000, 2, 504, "cpu", 64 * 10**9
    ),
    first_batch=[
        PlannedSequence(1, "chosen", {"nll": 1.0}, 1206, 3, 3, 0, PIECES),
        PlannedSequence(1, "sampled", {"kl": 0.1, "advantage": 0.5}, 1206, 3, 2, 4, PIECES[:2]),
    ],
    warnings=[],
)


def shown(plan: DistillPlan, colour: bool = False) -> str:
    console = Console(width=80, force_terminal=colour, color_system="256" if colour else None)
    with console.capture() as capture:
        console.print(show_plan(plan))
    return capture.get()


def test_what_is_trained_is_in_brackets() -> None:
    text = shown(PLAN)
    assert "<s>2 + 2?↵\n … 1,200 tokens … ⟦4 … 1 token … </s>⟧\n" in text
    assert "The loss counts what is ⟦bold and in brackets⟧; the student only reads the rest." in text
    assert text.count("⟦") == 2  # of the legend, and of the one response with a term


def test_what_is_trained_is_bold_and_green_in_a_terminal() -> None:
    assert "\x1b[1;32m⟦\x1b[0m\x1b[1;32m4\x1b[0m" in shown(PLAN, colour=True)


def test_each_sequence_has_its_terms_and_its_counts() -> None:
    words = " ".join(shown(PLAN).split())
    assert "example 1, chosen: NLL; tokens: 1,206 of prompt, 3 of response" in words
    assert "example 1, sampled: 0.1 · KL + 0.5 · advantage; tokens: 1,206 of prompt, 3 of response, 2 trained" in words
    assert "First micro-batch: 1 of the 4 examples of step 3" in words


def test_memory_and_tokens_are_tables() -> None:
    text = shown(PLAN)
    assert "│ of prompts │        1,204 │        2,000 │  6,022 │" in text
    assert "Tokens of 5 steps" in text
    words = " ".join(text.split())
    assert "optimizer's states │ 1.1 GB" in words
    assert "activations │ 52.0 kB" in words
    assert "An estimate of the peak of a step" in text
    assert max(map(len, text.splitlines())) <= 80


def test_activations_that_cannot_be_estimated_are_told() -> None:
    assert PLAN.memory is not None
    words = " ".join(shown(replace(PLAN, memory=replace(PLAN.memory, activations=None))).split())
    assert "activations │ unknown" in words
    assert "The activations cannot be estimated without this student's weights" in words


def test_a_finished_run_has_no_step_left() -> None:
    assert "No step is left" in shown(replace(PLAN, tokens=None, memory=None, first_batch=[]))


def test_the_command_shows_the_plan_and_writes_it_as_json(runner: CliRunner, filled: Filled, tmp_path: Path) -> None:
    words = ["distill", "--objective", "kd", "--student", str(filled.models.student), "--cache", str(filled.cache)]
    words += [
        "--output",
        str(tmp_path / "out"),
        "--batch-size",
        "4",
        "--dry-run",
        "--report",
        str(tmp_path / "plan.json"),
    ]
    result = runner.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "Nothing was trained or written." in result.output
    assert '"first_batch": [' in (tmp_path / "plan.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_after_a_stop_nothing_was_written(dry_run: bool, tmp_path: Path) -> None:
    (tmp_path / "adpa.json").touch()
    options = {"dry_run": dry_run, "output": tmp_path, "save_steps": 1, "resume_from_checkpoint": None}
    assert (cli._go_on_training(options) == "nothing was written") == dry_run

"""The report of stage two in a terminal, and the lines below it."""

from dataclasses import replace

import pytest
from rich.console import Console

from adpa.pipeline.distill import DistillReport
from adpa.pipeline.terminal import distill
from adpa.pipeline.terminal.distill import show_distill

REPORT = DistillReport(
    objective="sft",
    output="runs/sft",
    scoring=None,
    responses={"chosen": "a723f17867f68313"},
    data="prefs.jsonl",
    examples=8,
    trained_parameters=100,
    compute_dtype="float32",
    weights_dtype="float32",
    steps=1,
    first_loss=2.0,
    last_loss=1.5,
    tokens_per_second=10.0,
    seconds=1.0,
    warnings=[],
)


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_lines_to_copy_are_never_broken(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = "runs/" + "a-long-name/" * 12
    monkeypatch.setattr(distill, "serving_lines", lambda student: [f"vllm serve {student}", "vllm chat"])
    console = Console(width=columns, record=True)
    console.print(show_distill(replace(REPORT, output=output)), crop=False)
    assert console.export_text().splitlines()[-2:] == [f"  vllm serve {output}", "  vllm chat"]


@pytest.mark.parametrize(("examples", "shown"), [(0, False), (2, True)])
def test_held_out_examples_have_rows_only_if_there_are_any(examples: int, shown: bool) -> None:
    console = Console(width=80, record=True)
    console.print(show_distill(replace(REPORT, validation_examples=examples)))
    text = console.export_text()
    assert ("validation examples" in text, "stopped early" in text) == (shown, shown)

"""Figures beside predictions, on known answers."""

import json
from pathlib import Path

import pytest
from benchmarks.gpu.part import Failure, Figure, Skipped
from benchmarks.gpu.predictions import PREDICTIONS, Prediction
from benchmarks.gpu.results import PartResult, Results, measured, number, row

RANGE = Prediction("e", "a ratio", 5, 7, "reading")
AT_MOST = Prediction("e", "waits", None, 1, "reading")
AT_LEAST = Prediction("b", "speed", 698, None, "a README")
EXACT = Prediction("c", "copy", 3000, 3000, "gpu.md")


def results(**figures: list[Figure]) -> Results:
    machine = {"device": "NVIDIA H100 80GB HBM3", "memory": 80e9, "driver": "580.1", "versions": {"torch": "2.13.0"}}
    parts = {letter: PartResult(f"part {letter}", figures=figures.get(letter, [])) for letter in "abcdefg"}
    return Results(machine, 8.0, parts)


@pytest.mark.parametrize(
    ("prediction", "text", "ratios"),
    [
        (RANGE, "5 to 7", {6.0: 1.0, 2.5: 0.5, 14.0: 2.0, 5.0: 1.0}),
        (AT_MOST, "at most 1", {0.0: 1.0, 1.0: 1.0, 3.0: 3.0}),
        (AT_LEAST, "at least 698", {1000.0: 1.0, 349.0: 0.5}),
        (EXACT, "3,000", {3000.0: 1.0, 1500.0: 0.5, 6000.0: 2.0}),
    ],
)
def test_a_ratio_is_to_the_nearer_end_of_a_prediction(
    prediction: Prediction, text: str, ratios: dict[float, float]
) -> None:
    assert prediction.text == text
    assert {value: prediction.ratio(value) for value in ratios} == ratios


def test_nothing_is_divided_by_a_prediction_of_zero() -> None:
    assert Prediction("e", "waits", None, 0, "").ratio(2.0) is None


def test_numbers_have_three_digits_and_thousands_apart() -> None:
    values = [1234567.8, 99.96, 12.345, 0.012345, 0.0]
    assert list(map(number, values)) == ["1,234,568", "100", "12.3", "0.0123", "0"]


def test_a_figure_is_shown_with_its_unit_and_spread() -> None:
    assert measured(Figure("copy", 2.5)) == "2.5"
    assert measured(Figure("copy", 3000.0, "GB/s", 2900.4, 3100.0)) == "3,000 GB/s (2,900 to 3,100)"


def test_a_row_has_what_is_there() -> None:
    figure = Figure("a ratio", 10.5, note="under a | profiler")
    assert row("e", figure, RANGE) == "| e | a ratio | 5 to 7 | 10.5 | 1.5 | reading | under a \\| profiler |"
    assert row("e", figure, None) == "| e | a ratio |  | 10.5 |  |  | under a \\| profiler |"
    assert row("e", None, RANGE) == "| e | a ratio | 5 to 7 | not measured |  | reading |  |"


def test_rates_are_shares_of_the_measured_ceilings() -> None:
    found = results(
        c=[Figure("bfloat16 product", 800.0), Figure("copy", 3000.0)],
        d=[Figure("1.5B: decoder, FLOP/s", 400.0), Figure("1.5B: head, FLOP/s", 600.0)],
        e=[Figure("training, FLOP/s", 200.0)],
    )
    assert found.rates() == {
        "peak_flops": 800e12,
        "scoring_share": 0.5,
        "head_share": 0.75,
        "training_share": 0.25,
        "memory": 80e9,
        "memory_rate": 3e12,
    }
    assert found.costs_command() == (
        "python -m benchmarks.costs --peak-flops 8e+14 --scoring-share 0.5 --head-share 0.75 "
        "--training-share 0.25 --memory 8e+10 --memory-rate 3e+12"
    )


def test_a_rate_without_its_ceiling_is_left_out() -> None:
    assert results(e=[Figure("training, FLOP/s", 200.0)]).rates() == {"memory": 80e9}


def test_every_prediction_is_written_measured_or_not(tmp_path: Path) -> None:
    results(c=[Figure("copy", 1500.0, "GB/s")]).write(tmp_path / "benchmarks")
    paths = sorted(path.name for path in (tmp_path / "benchmarks").iterdir())
    assert paths == ["gpu-nvidia-h100-80gb-hbm3.json", "gpu-nvidia-h100-80gb-hbm3.md"]
    found = json.loads((tmp_path / "benchmarks" / paths[0]).read_text())
    by_name = {one["figure"]: one for one in found["predictions"]}
    assert by_name["copy"] == {
        "part": "c",
        "figure": "copy",
        "low": 3000,
        "high": 3000,
        "source": "gpu.md",
        "measured": 1500.0,
        "ratio": 0.5,
    }
    assert by_name["training, FLOP/s"]["measured"] is None
    table = (tmp_path / "benchmarks" / paths[1]).read_text()
    assert table.startswith("# Measured on NVIDIA H100 80GB HBM3\n\n`make bench-gpu`: torch 2.13.0, driver 580.1.")
    assert "| c | copy | 3,000 | 1,500 GB/s | 0.5 | gpu.md |  |" in table
    assert table.count("not measured") == len(PREDICTIONS) - 1


def test_what_failed_and_what_was_skipped_stands_below_the_table() -> None:
    found = results()
    for report in (Failure("a way", "ValueError: no"), Skipped("vLLM", "vLLM is not installed")):
        found.parts["d"].add(report)
    assert "| d | part d | not run | 0 | a way: ValueError: no; vLLM: skipped, vLLM is not installed |" in found.table()


def test_no_two_predictions_are_of_one_figure() -> None:
    assert len({(prediction.part, prediction.figure) for prediction in PREDICTIONS}) == len(PREDICTIONS)

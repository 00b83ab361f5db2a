"""The tables of a study, from rewards that are easy to check, and its plots."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from tests.lab.test_advantages import ROW

from adpa.data.cache.signal_rows import plain_schema, plain_table
from adpa.data.cache.signals import SignalTable
from adpa.lab.evaluate import Evaluation
from adpa.lab.methods import Method
from adpa.lab.plots import plot_advantages, plot_gamma, plot_rewards, plot_study
from adpa.lab.report import StudyReport, markdown_tables, report_study
from adpa.lab.runs import Result

METHODS = {"SFT": Method("sft"), "ADPA": Method("adpa", {"advantage_weight": 2}, control="SFT")}
SWEPT = [{"advantage_weight": gamma, "plausibility": tau} for gamma in (1, 2) for tau in (0, 0.05)]
VARIANTS = {str(one): Method("adpa", one, swept=one) for one in SWEPT}
REWARDS: Mapping[str, list[list[float]]] = {
    "SFT student": [[0.5, 0.5], [0.4, 0.6]],
    "teacher": [[1.0, 1.0], [1.0, 1.0]],
    "SFT": [[0.5, 0.7], [0.4, 0.6]],
    "ADPA": [[0.8, 1.0], [0.3, 0.5]],
    **{name: [[0.5, 0.5], [0.5, 0.5]] for name in VARIANTS},
}


@pytest.fixture
def report(tmp_path: Path) -> StudyReport:
    results = [
        Result(name, seed, Evaluation(tuple(rewards), tuple(rewards)), 1.0, {"student/implausible_mass": 0.2}, "0.1.0")
        for name, by_seed in REWARDS.items()
        for seed, rewards in zip((11, 12), by_seed, strict=True)
    ]
    return report_study(tmp_path, METHODS, VARIANTS, results, seconds=1.0)


def test_a_method_is_compared_with_the_sft_student_and_with_its_control(report: StudyReport) -> None:
    student, teacher, sft, adpa = report.methods
    assert [one.name for one in report.methods] == ["SFT student", "teacher", "SFT", "ADPA"]
    assert (student.wins.mean, teacher.wins.mean, sft.wins.mean) == (0.5, 1.0, 0.625)
    assert adpa.reward.mean == pytest.approx(0.65)
    assert adpa.wins.mean == pytest.approx(0.5)  # both prompts of one seed, none of the other
    assert adpa.gain is not None
    assert adpa.gain.mean == pytest.approx(np.mean([0.3, 0.3, -0.1, -0.1]))
    assert adpa.gain.low == pytest.approx(-0.1)  # the interval covers the difference between seeds
    assert adpa.gain.high == pytest.approx(0.3)
    assert (adpa.worse_seeds, sft.worse_seeds) == ([12], [])
    assert len(report.variants) == 4


def test_every_reward_is_in_a_table_that_others_can_read(report: StudyReport) -> None:
    table = pq.read_table(Path(report.output) / "results.parquet").to_pylist()
    assert len(table) == 2 * (4 + 4)
    found = next(row for row in table if row["method"] == "ADPA" and row["seed"] == 12)
    assert found["version"] == "0.1.0"
    assert (found["sampled"], found["options"]) == ([0.3, 0.5], '{"advantage_weight": 2}')


def test_the_tables_say_what_was_measured_on_what_and_which_options_were_chosen(report: StudyReport) -> None:
    text = markdown_tables(report)
    assert text == (Path(report.output) / "tables.md").read_text()
    assert "2 seeds (11, 12), 2 prompts each" in text
    assert "by adpa 0.1.0\n" in text
    assert report.versions == ["0.1.0"]
    assert "| ADPA | 0.650 [" in text
    assert "+0.100 [-0.100, +0.300] (SFT) | 0.200 | 12 |" in text
    assert '- ADPA: {"advantage_weight": 2}' in text


def test_the_pictures_show_every_method_and_a_line_for_each_plausibility(report: StudyReport) -> None:
    axes = Figure().subplots()
    plot_rewards(axes, report.methods)
    assert [label.get_text() for label in axes.get_yticklabels()] == [one.name for one in report.methods]
    axes = Figure().subplots()
    plot_gamma(axes, report.variants, student=0.5)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "plausibility 0",
        "plausibility 0.05",
        "SFT student",
    ]
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[1, 0.5], [2, 0.5]]


def test_every_alternative_is_a_point_of_the_picture_of_advantages() -> None:
    axes = Figure().subplots()
    plot_advantages(axes, SignalTable([plain_table([ROW], plain_schema(2))]))
    points = np.asarray(axes.lines[0].get_xydata())
    np.testing.assert_allclose(points[:, 0], np.exp(np.ravel(ROW.topk_logprobs).astype(float)))
    np.testing.assert_array_equal(points[:, 1], np.ravel(np.asarray(ROW.topk_advantages)))


def test_pictures_are_files(report: StudyReport, tmp_path: Path) -> None:
    plot_study(tmp_path, report, SignalTable([plain_table([ROW], plain_schema(2))]))
    for name in ("rewards", "gamma", "advantages"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")

"""``adpa runs``: every student below a directory, what differs between them, and what is wrong with some."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import RunsReport, cli, distill, list_runs
from adpa.errors import OptionError
from adpa.pipeline.terminal.runs import show_runs
from adpa.pipeline.training.evaluations import record_evaluation
from adpa.pipeline.training.run_directory import read_record


def evaluation(win_rate: float, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options and the report of an evaluation."""
    options = {
        "student": "s",
        "baseline": "org/b",
        "teacher": "org/t",
        "reference": "org/r",
        "data": "org/d",
        "seed": 0,
    }
    interval = {"mean": win_rate, "low": win_rate - 0.125, "high": win_rate + 0.125}
    answers = {"implicit_reward": 1.5, "tokens": 20.5, "repetition": 0.125}
    report = {"student": answers, "baseline": answers, "win_rate": interval, "prompts": 8, "note": "N."}
    return options | {"temperature": 1.0} | settings, report


@pytest.fixture(scope="module")
def runs(filled: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished students, one unfinished run, and two that are damaged, at different depths."""
    folder = tmp_path_factory.mktemp("runs")
    student = str(filled.models.student)
    brief: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "batch_size": 4}
    distill("sft", student, filled.cache, folder / "a" / "sft", **brief)
    distill("adpa", student, filled.cache, folder / "b" / "deep" / "adpa", advantage_weight=0.25, **brief)
    for name in ("unfinished", "text", "other"):
        (folder / name).mkdir()
    record = read_record(folder / "a" / "sft")
    for late in ("steps", "losses", "seconds", "time", "warnings"):
        del record[late]
    (folder / "unfinished" / "adpa.json").write_text(json.dumps(record))
    (folder / "text" / "adpa.json").write_text('{"objective": "sf')
    (folder / "other" / "adpa.json").write_text('{"name": "something else"}')
    for rate, settings in ((0.625, {}), (0.5, {"temperature": 0.0})):
        record_evaluation(str(folder / "a" / "sft"), *evaluation(rate, **settings))
    return folder


def shown(report: RunsReport, columns: int) -> list[str]:
    console = Console(width=columns, record=True)
    console.print(show_runs(report))
    return [line.rstrip() for line in console.export_text().splitlines()]


def row(lines: list[str], start: str) -> list[str]:
    """The words of the only line with this beginning."""
    (line,) = [line for line in lines if line.startswith(start)]
    return line.split()


def test_every_run_is_listed_by_its_path(runs: Path) -> None:
    report = list_runs(runs)
    assert [(run.path, run.finished, run.steps) for run in report.runs] == [
        ("a/sft", True, 2),
        ("b/deep/adpa", True, 2),
        ("unfinished", False, None),
    ]
    losses = read_record(runs / "b" / "deep" / "adpa")["losses"]
    assert (report.runs[1].first_loss, report.runs[1].last_loss) == (losses[0]["loss"], losses[1]["loss"])
    assert report.runs[1].settings["γ"] == 0.25
    assert "γ" not in report.runs[0].settings
    assert [each["report"]["win_rate"]["mean"] for each in report.runs[0].evaluations] == [0.625, 0.5]


def test_a_damaged_run_is_told(runs: Path) -> None:
    broken = list_runs(runs).broken
    assert list(broken) == ["other", "text"]
    assert broken["other"] == "adpa.json or what lies beside it is damaged: adpa.json is no record of a run"
    assert broken["text"] == "adpa.json or what lies beside it is damaged: adpa.json is no JSON (line 1, column 15)"


def test_the_newest_is_first_if_that_is_asked(runs: Path) -> None:
    times = [run.time for run in list_runs(runs, sort="time").runs]
    assert times == sorted(times, reverse=True)
    assert len(times) == 3


def test_what_all_runs_share_is_one_line_and_the_rest_are_columns(runs: Path) -> None:
    lines = shown(list_runs(runs), 200)
    assert lines[0].startswith("all: student model-3")
    assert lines[0].endswith("rate 2e-05, max steps 2, batch 4")
    assert lines[2].split()[:2] == ["run", "objective"]
    assert row(lines, "unfinished ") == ["unfinished", "sft", *["–"] * 3, "unfinished", "–", "–", "–"]
    assert row(lines, "b/deep/adpa")[1:5] == ["adpa", "sampled", "0.25", "0.05"]
    assert lines[-1] == "2 finished, 1 unfinished, 2 broken"
    assert "broken other: adpa.json or what lies beside it is damaged: adpa.json is no record of a run" in lines


def test_evaluations_have_a_table_of_their_own(runs: Path) -> None:
    lines = shown(list_runs(runs), 120)
    lines = lines[lines.index("Evaluations") :]
    assert lines[1] == "all: baseline org/b, data org/d, prompts 8"
    assert [line.split() for line in lines if line.startswith("a/sft")] == [
        ["a/sft", "1", "0.625", "[0.5,", "0.75]", "1.5", "20.5", "0.125"],
        ["a/sft", "0", "0.5", "[0.375,", "0.625]", "1.5", "20.5", "0.125"],
    ]


def test_of_greedy_answers_the_win_rate_stands_beside_that_of_sampled_ones(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "adpa.json").write_text((runs / "a" / "sft" / "adpa.json").read_text())
    (tmp_path / "README.md").write_text("mine")
    options, report = evaluation(0.625)
    greedy = evaluation(0.75)[1]
    pairs = {"student_perplexity": 6.25, "baseline_perplexity": 7.5, "reward_accuracy": 0.875}
    record_evaluation(str(tmp_path), options, report | {"temperature": 1.0, "greedy": greedy} | pairs)
    lines = shown(list_runs(tmp_path), 400)
    head, _, values = lines[lines.index("Evaluations") + 3 :][:3]
    names = ["win rate", "greedy win rate", "implicit reward", "tokens", "repetition"]
    assert head.split("  ")[0] == "run"
    assert " ".join(head.split()) == " ".join(["run", *names, "perplexity of the chosen", "reward accuracy"])
    assert values.split() == [
        ".",
        "0.625",
        "[0.5,",
        "0.75]",
        "0.75",
        "[0.625,",
        "0.875]",
        *("1.5", "20.5"),
        "0.125",
        "6.25",
        "0.875",
    ]


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_no_column_and_no_number_is_lost_in_a_narrow_terminal(columns: int, runs: Path) -> None:
    lines, wide = (shown(list_runs(runs), width) for width in (columns, 400))
    assert max(map(len, lines)) <= columns
    words = {word for line in wide if not line.startswith(("broken", "─")) for word in line.split()}
    assert words <= {word for line in lines for word in line.split()}


def test_one_run_alone_is_shown_with_its_settings(runs: Path) -> None:
    lines = shown(list_runs(runs / "b"), 80)
    assert lines[0].startswith("student model-3")
    assert "γ 0.25" in " ".join(lines[:3])
    assert row(lines, "deep/adpa")[:2] == ["deep/adpa", "2"]


def test_the_directory_may_be_a_run_itself(runs: Path) -> None:
    report = list_runs(runs / "a" / "sft")
    assert [run.path for run in report.runs] == ["."]
    assert "run" in [line.split()[0] for line in shown(report, 80) if line], "the head of the column stays whole"


def test_held_out_losses_are_a_column(runs: Path, tmp_path: Path) -> None:
    record = read_record(runs / "a" / "sft") | {"held_out": [{"step": 1, "eval_loss": 3.0}, {"eval_loss": 2.125}]}
    (tmp_path / "adpa.json").write_text(json.dumps(record))
    report = list_runs(tmp_path)
    assert report.runs[0].held_out_loss == 2.125
    assert "held out" in "\n".join(shown(report, 80))


def test_students_of_the_same_last_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    record = read_record(runs / "a" / "sft")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        student = {"name": f"{name}/small", "revision": None, "digest": name}
        (tmp_path / name / "adpa.json").write_text(json.dumps(record | {"student": student}))
    lines = shown(list_runs(tmp_path), 80)
    assert row(lines, "one ")[1] == "one/small"
    assert row(lines, "two ")[1] == "two/small"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("empty", "found no adpa.json in it or below it; name a directory with outputs of adpa distill"),
        ("file", "is a file; name the directory that it lies in"),
        ("emptu", "no such directory; did you mean {}/empty?"),
    ],
)
def test_where_there_is_no_run_one_line_says_so(name: str, problem: str, tmp_path: Path, runner: CliRunner) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    done = runner.invoke(cli.app, ["runs", str(tmp_path / name)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == f"adpa: {tmp_path / name}: {problem.format(tmp_path)}\n"
    with pytest.raises(OptionError):
        list_runs(tmp_path / name)


def test_the_summary_has_everything(runs: Path, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["runs", str(runs), "--report", "-"])
    summary = json.loads(done.stdout)
    assert [run["path"] for run in summary["runs"]] == ["a/sft", "b/deep/adpa", "unfinished"]
    assert summary["runs"][0]["evaluations"][0]["settings"]["data"] == "org/d"
    assert summary["broken"].keys() == {"other", "text"}

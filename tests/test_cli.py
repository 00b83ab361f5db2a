"""The command line: its errors are one line, its options may stand in a file, its reports are printed and kept."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from tests.commands import COMMANDS, adpa
from tests.conftest import Models, Row, WriteRows
from typer.testing import CliRunner

from adpa import cli, precompute
from adpa.commands import as_command


def test_the_version_is_the_installed_ones(runner: CliRunner) -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"adpa {version('adpa')}\n"


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, models: Models) -> None:
    done = adpa("precompute", "--teacher", models.teacher, "--data", "no.jsonl", "--cache", "c", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "adpa: no.jsonl: no such file or directory; check --data\n"
    assert done.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path, models: Models) -> None:
    done = adpa(
        "precompute", "--teacher", models.teacher, "--data", "no.jsonl", "--cache", "c", "--debug", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "DataError" in done.stderr


def test_a_run_reports_on_the_terminal_and_in_a_file(
    tmp_path: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows
) -> None:
    data = write_rows(preference_rows[:3])
    options = ("--teacher", models.teacher, "--data", data, "--cache", "cache", "--report", "report.json")
    done = adpa("precompute", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= {
        "scored", "reused", "tokens", "truncated_prompts", "truncated_responses", "dropped", "scoring", "responses",
        "seconds", "engine", "engine_reason",
    }  # fmt: skip
    assert report["scored"] == 6
    assert report["scoring"] in done.stdout
    assert ("truncated responses" in done.stdout) == (report["truncated_responses"] > 0)


def test_a_probe_is_shown_below_the_counts_and_without_one_bytes_are_told_to_be_at_most(
    tmp_path: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows, runner: CliRunner
) -> None:
    data, report = write_rows(preference_rows[:3]), tmp_path / "report.json"
    options = ["--teacher", str(models.teacher), "--reference", str(models.reference), "--data", str(data)]
    options += ["--cache", str(tmp_path / "cache"), "--report", str(report), "--dry-run", "--top-k", "30"]
    at_most = "Bytes: at most"
    assert at_most in runner.invoke(cli.app, ["precompute", *options]).stdout
    assert json.loads(report.read_text())["probe"] is None
    done = runner.invoke(cli.app, ["precompute", *options, "--probe", "4"])
    assert done.exit_code == 0
    assert at_most not in done.stdout
    probe = json.loads(report.read_text())["probe"]
    text = " ".join(done.stdout.split())
    assert f"Probed: 4 of 6 responses, {probe['tokens']} tokens, with K = 1,000" in text
    assert [kept["top_k"] for kept in probe["by_top_k"]] == [10, 20, 30, 50, 100]
    for kept in probe["by_top_k"]:
        assert f"{kept['top_k']} {kept['captured_mass']:.4f} {kept['captured_mass_5']:.4f} {kept['tail']:.4f}" in text
        assert f"{kept['advantage_lost']:.2%}" in text
        assert f"{kept['bytes']:,}" in text
    assert f"Hours: {probe['teacher_hours'] + probe['reference_hours']:.3g} (teacher" in text


def test_a_cache_is_inspected_in_the_terminal_and_as_a_page(
    tmp_path: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows, runner: CliRunner
) -> None:
    cache, page, report, config = (tmp_path / name for name in ("cache", "page.html", "report.json", "adpa.yaml"))
    precompute(teacher=str(models.teacher), data=str(write_rows(preference_rows[:2])), cache=cache, top_k=3)
    config.write_text(f"cache: {cache}\nresponse-set: chosen\nreport: {report}\n")
    done = runner.invoke(cli.app, ["inspect", "--config", str(config), "--html", str(page)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert preference_rows[0]["chosen"][0]["content"] in done.stdout
    assert str(page) in "".join(line.rstrip() for line in done.stdout.splitlines())
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert len(json.loads(report.read_text())["responses"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no cache there; make it with adpa precompute, or check the path"),
        (["c", "--count", "0"], "--count 0; expected at least 1"),
        (["c", "--html", "no/page"], "--html no/page: cannot be written there; name a file in an existing directory"),
    ],
)
def test_a_cache_that_cannot_be_inspected_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, runner: CliRunner
) -> None:
    done = runner.invoke(cli.app, ["inspect", *arguments])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"adpa: {message}\n")


@pytest.mark.parametrize("name", [name.split()[1] for name in COMMANDS if name.startswith("cache ")])
def test_a_command_on_a_cache_says_where_there_is_none(name: str, runner: CliRunner, tmp_path: Path) -> None:
    arguments = {"export": ["--output", str(tmp_path / "rows.parquet")], "merge": [str(tmp_path)]}.get(name, [])
    done = runner.invoke(cli.app, ["cache", name, "nowhere", *arguments])
    message = "adpa: nowhere: no cache there; make it with adpa precompute, or check the path\n"
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.slow
def test_an_evaluation_is_printed_line_by_line_and_leaves_nothing_without_a_cache(
    tmp_path: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    inputs = {"student": models.student, "baseline": models.other_student}
    inputs |= {"teacher": models.teacher, "reference": models.reference, "data": write_rows(preference_rows[:3])}
    options = [part for name, path in inputs.items() for part in (f"--{name}", path)]
    done = adpa("evaluate", *options, "--max-new-tokens", 5, "--report", "report.json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    lines = [" ".join(line.strip("│ ").replace("│", " ").split()) for line in done.stdout.splitlines()]
    summaries = [part[name] for part in (report, report["greedy"]) for name in ("student", "baseline")]
    for field, label in (("implicit_reward", "implicit reward"), ("implicit_reward_per_token", "… per token")):
        assert " ".join([label, *(f"{one[field]:.4g}" for one in summaries)]) in lines
    wins = [part["win_rate"] for part in (report, report["greedy"])]
    assert " ".join(["win rate", *(f"{w['mean']:.3g} [{w['low']:.3g}, {w['high']:.3g}]" for w in wins)]) in lines
    perplexities = [f"{report[f'{name}_perplexity']:,.0f}" for name in ("student", "baseline")]  # of random models
    assert " ".join(["perplexity of the chosen", *perplexities]) in lines
    assert "is also what ADPA trains on" in " ".join(lines)
    assert not list(tmp_path.glob("adpa-evaluation-*"))


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("broken\nmachine"), TypeError("a bug")])
def test_a_failure_of_the_machine_is_one_line_and_exit_code_1(
    error: Exception, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        """Fail."""
        raise error

    app = typer.Typer()
    app.command("fail")(as_command(fail))
    done = runner.invoke(app, [])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert " ".join(str(error).split()) in done.stderr

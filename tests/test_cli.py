"""The command line: its errors are one line, its options may stand in a file, its reports are printed and kept."""

import inspect
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from tests.commands import COMMANDS, adpa
from tests.conftest import Models, Row, WriteRows, heed_signals
from typer.testing import CliRunner
from upath import UPath

from adpa import cli, precompute
from adpa.commands import as_command


def test_the_version_is_the_installed_ones(runner: CliRunner) -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"adpa {version('adpa')}\n"


def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, models: Models) -> None:
    done = adpa("precompute", "--teacher", models.teacher, "--data", "no.jsonl", "--cache", "c", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "adpa: no.jsonl: no such file or directory; check --data\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing command. See adpa --help"),
        (("train",), "No such command 'train'. See adpa --help"),
        (("distill", "--objective", "dpo"), "'dpo' is not one of 'sft', 'kd', 'dckd', 'adpa'. See adpa distill --help"),
        (("distill",), "Missing option '--objective'. Choose from: sft, kd, dckd, adpa See adpa distill --help"),
        (("precompute",), "Missing option '--teacher'. See adpa precompute --help"),
    ],
)
def test_a_command_that_cannot_be_parsed_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = adpa(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("adpa: ")
    assert done.stderr.endswith(f"{message}\n")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "ignored", "ended"),
    [
        (signal.SIGINT, False, (130, "adpa: interrupted\n")),
        (signal.SIGTERM, False, (143, "")),
        (signal.SIGHUP, False, (129, "")),
        (signal.SIGHUP, True, (2, "adpa: --teacher ./t: no such directory")),
    ],
    ids=["ctrl-c", "a scheduler", "a closed terminal", "nohup"],
)
def test_a_stopped_run_ends_in_order(number: int, ignored: bool, ended: tuple[int, str], tmp_path: Path) -> None:
    """What is open is closed; a run under nohup outlives its terminal."""
    program = (
        "import os, sys; from unittest import mock; from adpa import cli\n"
        f"def stop(*_): os.kill(os.getpid(), {number:d})\n"
        "with mock.patch('adpa.pipeline.precompute.check_writable', side_effect=stop): cli.main()"
    )
    command = [sys.executable, "-c", program, "precompute", "--teacher", "./t", "--data", "d", "--cache", "c"]
    if ignored:
        command = ["nohup", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=heed_signals)
    said = done.stderr.removeprefix("nohup: ignoring input\n")
    assert (done.returncode, said.partition(";")[0]) == ended


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
    assert "truncated responses" in done.stdout


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
        ([".", "--count", "0"], "--count 0; expected at least 1"),
        ([".", "--html", "no/page"], "--html no/page: cannot be written there; name a file in an existing directory"),
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


def test_an_argument_has_its_place_and_no_option(runner: CliRunner) -> None:
    assert "Missing argument 'CACHE'" in runner.invoke(cli.app, ["inspect"]).output
    assert "No such option: --cache" in runner.invoke(cli.app, ["inspect", "--cache", "c"]).output


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
    student = report["student"]
    assert f"student implicit reward {student['implicit_reward']:,.4g}" in lines
    assert f"implicit reward per token {student['implicit_reward_per_token']:,.4g}" in lines
    assert f"win rate mean {report['win_rate']['mean']:,.4g}" in lines
    assert f"low {report['win_rate']['low']:,.4g}" in lines
    assert "is also what ADPA trains on" in " ".join(lines)
    assert not list(tmp_path.glob("adpa-evaluation-*"))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The arguments that the command line passes to the stage."""
    seen: dict[str, object] = {}

    @dataclass
    class Nothing:
        done: bool = True

    def record(*arguments: object, **options: object) -> Nothing:
        seen.update(options)
        return Nothing()

    app = typer.Typer()
    record.__signature__ = inspect.signature(precompute)  # type: ignore[attr-defined]
    app.command("precompute")(as_command(record))
    app.command("other")(lambda: None)
    monkeypatch.setattr(cli, "app", app)
    return seen


def test_a_config_file_holds_options_and_the_command_line_outranks_it(
    recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("teacher: T\ndata: d.jsonl\ncache: C\ntop-k: 7\nmax_length: 99\n")
    done = runner.invoke(cli.app, ["precompute", "--config", str(config), "--max-length", "77"])
    assert done.exit_code == 0, done.output
    assert recorded["teacher"] == "T"
    assert recorded["cache"] == Path("C")
    assert (recorded["top_k"], recorded["max_length"]) == (7, 77)


@pytest.mark.parametrize("url", ["s3://bucket/team/cache", "s3://bucket/a//b"])
def test_a_cache_may_be_a_url(url: str, recorded: dict[str, object], runner: CliRunner, tmp_path: Path) -> None:
    done = runner.invoke(cli.app, ["precompute", "--teacher", "T", "--data", "d", "--cache", url])
    assert done.exit_code == 0, done.output
    assert isinstance(recorded["cache"], UPath)
    assert str(recorded["cache"]) == url
    (tmp_path / "run.yaml").write_text(f"teacher: T\ndata: d\ncache: {url}\n")
    runner.invoke(cli.app, ["precompute", "--config", str(tmp_path / "run.yaml")])
    assert str(recorded["cache"]) == url


def test_a_url_that_nothing_opens_is_one_line_and_exit_code_2(recorded: dict[str, object], runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["precompute", "--teacher", "T", "--data", "d", "--cache", "nothing://bucket/cache"])
    assert done.exit_code == 2
    assert done.stderr.startswith("adpa: nothing://bucket/cache: cannot be opened: ")
    assert len(done.stderr.splitlines()) == 1
    assert not recorded


def test_an_engine_argument_may_be_given_again_on_the_command_line_and_as_a_list_in_a_file(
    recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("teacher: T\ndata: d\ncache: C\nengine-arg: [seed=1, 'teacher:max_num_seqs=8']\n")
    done = runner.invoke(cli.app, ["precompute", "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert recorded["engine_arg"] == ["seed=1", "teacher:max_num_seqs=8"]
    again = ["--engine-arg", "seed=2", "--engine-arg", 'hf_overrides={"a": [1, 2]}']
    done = runner.invoke(cli.app, ["precompute", "--config", str(config), *again])
    assert done.exit_code == 0, done.output
    assert recorded["engine_arg"] == ["seed=2", 'hf_overrides={"a": [1, 2]}']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tap-k: 7", "has no option 'tap_k'"),
        ("- 1", "expected a mapping"),
        ("a: [", "--config"),
        (None, "--config"),
        ("top-k: 7\nteacher: T\ntop-k: 8", "'top-k' is there twice in"),
        ("top-k: 7\ntop_k: 8", "'top_k' is there twice"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_refused(
    text: str | None, message: str, runner: CliRunner, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    done = runner.invoke(cli.app, ["precompute", "--config", str(config)])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    recorded: dict[str, object], runner: CliRunner
) -> None:
    options = ["--teacher", "T", "--data", "d", "--cache", "c", "--report", "/nowhere/report.json"]
    done = runner.invoke(cli.app, ["precompute", *options])
    assert done.exit_code == 2
    assert "--report /nowhere/report.json: cannot be written there" in done.stderr
    assert not recorded


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


def test_an_option_that_is_off_unless_named_may_be_in_a_config_file(
    recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    options = ["--teacher", "T", "--data", "d", "--cache", "c"]
    (tmp_path / "run.yaml").write_text("lossy: true\ndry-run: false\n")
    done = runner.invoke(cli.app, ["precompute", *options, "--config", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    assert (recorded["lossy"], recorded["dry_run"]) == (True, False)
    runner.invoke(cli.app, ["precompute", *options, "--dry-run"])
    assert (recorded["lossy"], recorded["dry_run"]) == (False, True)


def test_a_repeatable_option_may_be_one_value_in_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "adpa.yaml").write_text("engine-arg: nonsense\nteacher: t\ndata: d\ncache: c\n")
    done = adpa("precompute", "--config", "adpa.yaml", cwd=tmp_path)
    assert done.stderr.startswith("adpa: --engine-arg nonsense; expected key=value"), "the option was read"

"""The command line: its help is part of the interface, its errors are one line, its options are the functions'."""

import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from tests.conftest import Models, Row, WriteRows, heed_signals
from typer.testing import CliRunner
from typing_extensions import Doc
from upath import UPath

from adpa import (
    cli,
    collect_garbage,
    distill,
    evaluate,
    export_cache,
    inspect_cache,
    list_cache,
    merge_cache,
    pack_cache,
    precompute,
    verify_cache,
)
from adpa.commands import Commands, as_command, load
from adpa.data.cache.format import prepare_cache
from adpa.lab.conduct import lab
from adpa.parameters import group_of
from adpa.pipeline.options import Group

COMMANDS: dict[str, Callable[..., Any]] = {
    "precompute": precompute,
    "distill": distill,
    "evaluate": evaluate,
    "inspect": inspect_cache,
    "lab": lab,
    "cache ls": list_cache,
    "cache verify": verify_cache,
    "cache gc": collect_garbage,
    "cache pack": pack_cache,
    "cache export": export_cache,
    "cache merge": merge_cache,
}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setattr("typer.rich_utils.FORCE_TERMINAL", None)  # CI may ask for colours
    return CliRunner(env={"COLUMNS": "80"})


def options_of(command: str) -> dict[str, Any]:
    """The parameters of a command as the parser has them, in the order of its help."""
    registered: Any = typer.main.get_command(cli.app)
    for part in command.split():
        registered = registered.commands[part]
    return {parameter.name: parameter for parameter in load(registered).params}


def test_the_programme_names_its_commands(runner: CliRunner) -> None:
    output = runner.invoke(cli.app, ["--help"]).output + runner.invoke(cli.app, ["cache", "--help"]).output
    assert all(name.split()[-1] in output for name in COMMANDS)


def test_the_version_is_the_installed_ones(runner: CliRunner) -> None:
    assert runner.invoke(cli.app, ["--version"]).output == f"adpa {version('adpa')}\n"


def run_light(commands: Iterable[str], folder: Path) -> list[str]:
    """What each of some commands says on standard error; all run in one process, none imports a slow package."""
    program = (
        "import json, sys; from typer.testing import CliRunner; from adpa import cli; said = []\n"
        "for words in sys.argv[1:]:\n"
        "    said.append(CliRunner().invoke(cli.app, words.split()).stderr)\n"
        "    slow = {'torch', 'transformers', 'datasets'} & sys.modules.keys()\n"
        "    if slow: sys.exit(f'{words}: imports {slow}')\n"
        "print(json.dumps(said))"
    )
    command = [sys.executable, "-c", program, *commands]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    said = run_light([f"{name} --help" for name in ("", "cache", *COMMANDS)], tmp_path)
    assert set(said) == {""}


def test_what_looks_after_a_cache_does_not_wait_for_torch(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    assert set(run_light([f"cache {name} ." for name in ("ls", "gc", "verify", "pack")], tmp_path)) == {""}


PRECOMPUTE = "precompute --teacher T --data D --cache C"
DISTILL = "distill --objective sft --student S --cache C --output O"
EVALUATE = "evaluate --student S --baseline B --teacher T --reference R --data D"
OUT_OF_RANGE = {
    f"{PRECOMPUTE} --top-k 0": "--top-k 0; expected at least 1",
    f"{PRECOMPUTE} --max-length 3": "--max-prompt-length 1024 with --max-length 3; expected 0 < max-prompt-length",
    f"{PRECOMPUTE} --tensor-parallel 0": "--tensor-parallel 0; expected at least 1",
    f"{PRECOMPUTE} --workers 2": "--workers 2 without --executor ray",
    f"{PRECOMPUTE} --part 3/2": "--part 3/2; expected i/n",
    f"{PRECOMPUTE} --responses best": "--responses best: found 'best'; expected chosen, rejected, sampled",
    f"{EVALUATE} --temperature -1": "--temperature -1; expected 0 or more",
    "inspect C --count 0": "--count 0; expected at least 1",
    "lab --output O --workers 0": "--workers 0; expected at least 1",
    f"{DISTILL} --learning-rate -1": "--learning-rate -1; expected 0 or more",
    f"{DISTILL} --plausibility 1": "--plausibility 1; expected at least 0 and less than 1",
}


def test_a_value_out_of_range_is_refused_in_one_line_before_torch_is_imported(tmp_path: Path) -> None:
    for message, said in zip(OUT_OF_RANGE.values(), run_light(OUT_OF_RANGE, tmp_path), strict=True):
        assert said.startswith(f"adpa: {message}")
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_is_an_option_with_help(name: str) -> None:
    registered: Any = typer.main.get_command(cli.app)
    for part in name.split():
        registered = registered.commands[part]
    command, options = load(registered), options_of(name)
    assert options.keys() == inspect.signature(COMMANDS[name]).parameters.keys() | {"config", "report", "debug"}
    assert all(option.help for option in options.values())
    first_line = inspect.getdoc(COMMANDS[name]).splitlines()[0]  # type: ignore[union-attr]
    assert command.help.startswith(first_line)
    assert registered.help == first_line, "the group's help says the same"
    assert "Raises" not in command.help


def test_the_help_names_the_options_of_the_workflow(runner: CliRunner) -> None:
    output = runner.invoke(cli.app, ["precompute", "--help"]).output
    for option in ("--teacher", "--reference", "--student", "--data", "--cache", "--responses", "--top-k", "--dry-run"):
        assert option in output
    for option in ("--engine", "--tensor-parallel", "--quantization", "--max-model-len", "--engine-arg"):
        assert option in output
    output = runner.invoke(cli.app, ["distill", "--help"]).output
    for option in ("--objective", "--on", "--plausibility", "--batch-size", "--micro-batch-size", "--set", "--output"):
        assert option in output
    output = runner.invoke(cli.app, ["inspect", "--help"]).output
    assert "CACHE" in output.splitlines()[1]
    for option in ("--response-set", "--scoring", "--example", "--count", "--html"):
        assert option in output
    output = runner.invoke(cli.app, ["evaluate", "--help"]).output
    for option in (
        "--student",
        "--baseline",
        "--teacher",
        "--reference",
        "--data",
        "--cache",
        "--temperature",
        "--engine",
    ):
        assert option in output


@pytest.mark.parametrize(("command", "option"), [("lab", "--seed <int>"), ("distill", "--set <str>")])
def test_a_repeatable_option_is_shown_with_what_it_takes_each_time(
    command: str, option: str, runner: CliRunner
) -> None:
    lines = runner.invoke(cli.app, [command, "--help"]).output.splitlines()
    assert any(line.strip("│ ").split()[:2] == option.split() for line in lines)


def panels(text: str) -> list[str]:
    """The titles of the groups in a help text."""
    return [line.strip("╭─╮ ") for line in text.splitlines() if line.startswith("╭─")]


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_shown_in_groups_what_must_be_decided_on_the_first_screen(name: str, runner: CliRunner) -> None:
    text = runner.invoke(cli.app, [*name.split(), "--help"]).output
    titles = [title for title in panels(text) if title != "Arguments"]
    assert titles == [group for group in Group if group in titles], "a group is shown once, in the order of Group"
    assert titles[-1] == "Other"
    first_screen = "\n".join(text.splitlines()[:24])
    for option in options_of(name).values():
        if option.required:
            assert (option.opts[0] if option.opts[0].startswith("-") else option.metavar) in first_screen


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_a_group(name: str) -> None:
    for parameter in inspect.signature(COMMANDS[name]).parameters.values():
        assert group_of(parameter) is not Group.OTHER, parameter.name


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut_in_any_width(name: str, columns: int, runner: CliRunner) -> None:
    text = runner.invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": str(columns)}).output
    assert max(map(len, text.splitlines())) <= columns
    assert {word for option in options_of(name).values() for word in option.opts if word[0] == "-"} <= {*text.split()}


def test_brackets_are_text_and_no_markup(runner: CliRunner) -> None:
    def stage(model: Annotated[str, Doc("A [bold]model[/bold]: org/name[@revision]."), Group.DECIDE]) -> None:
        """Take [one] model.

        Or org/name[@revision].
        """

    app = typer.Typer(cls=Commands)
    app.command("stage")(lambda: as_command(stage))
    app.command("other")(lambda: None)
    text = runner.invoke(app, ["stage", "--help"]).output
    assert "Take [one] model." in text
    assert "A [bold]model[/bold]: org/name[@revision]." in text
    assert "Or org/name[@revision]." in text
    for command, option in (("precompute", "teacher"), ("evaluate", "student"), ("distill", "student")):
        help_text = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
        (line,) = [line for line in help_text.splitlines() if f" --{option} " in line]
        assert "org/name[@revision] of the Hub." in line


def test_the_names_of_a_choice_are_in_the_help(runner: CliRunner) -> None:
    text = " ".join(runner.invoke(cli.app, ["precompute", "--help"], env={"COLUMNS": "200"}).output.split())
    assert "One of auto, float32, bfloat16, float16." in text


def test_an_option_means_the_same_when_samples_are_evaluated_as_when_they_are_trained_on() -> None:
    of_precompute, of_evaluate = (inspect.signature(stage).parameters for stage in (precompute, evaluate))
    differing = [
        name for name in of_evaluate.keys() & of_precompute.keys() if str(of_evaluate[name]) != str(of_precompute[name])
    ]
    assert sorted(differing) == ["cache", "data", "reference", "student"]


def adpa(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "adpa", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_help_is_shown_by_a_terminal_that_knows_ascii_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = adpa("distill", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--kl-weight" in done.stdout


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
        (signal.SIGHUP, True, (2, "adpa: ./t: no such directory")),
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
    assert (done.returncode, said.partition(",")[0]) == ended


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


@pytest.mark.parametrize("command", ["ls", "verify", "gc", "pack", "export", "merge"])
def test_the_help_of_a_cache_command_names_its_arguments_plainly(command: str, runner: CliRunner) -> None:
    shown = runner.invoke(cli.app, ["cache", command, "--help"]).stdout
    arguments = "CACHE OTHER" if command == "merge" else "CACHE"
    assert shown.split("\n")[1].strip() == f"Usage: {shown.split()[1]} cache {command} [OPTIONS] {arguments}"
    assert "Directory or URL of" in " ".join(shown.split())
    assert "--no-" not in shown


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

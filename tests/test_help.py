"""The help of every command: what it says, how it is grouped, and that it does not wait for torch."""

import inspect
from pathlib import Path
from typing import Annotated

import pytest
import typer
from tests.commands import COMMANDS, adpa, options_of, parameters_of, refusals, registered_as, run_light
from typer.testing import CliRunner
from typing_extensions import Doc

from adpa import cli, evaluate, precompute
from adpa.commands import as_command
from adpa.data.cache.format import prepare_cache
from adpa.parameters import group_of
from adpa.parser import Commands, load
from adpa.pipeline.options import Group


def test_the_programme_names_its_commands(runner: CliRunner) -> None:
    output = runner.invoke(cli.app, ["--help"]).output + runner.invoke(cli.app, ["cache", "--help"]).output
    assert all(name.split()[-1] in output for name in COMMANDS)


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    said = run_light([f"{name} --help" for name in ("", "cache", *COMMANDS)], tmp_path)
    assert {(answer.exit_code, answer.stderr) for answer in said} == {(0, "")}


def test_what_looks_after_a_cache_does_not_wait_for_torch(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    said = run_light([f"cache {name} ." for name in ("ls", "gc", "verify", "pack")], tmp_path)
    assert {(answer.exit_code, answer.stderr) for answer in said} == {(0, "")}


def test_a_command_alone_does_not_wait_for_torch(tmp_path: Path) -> None:
    said = refusals(COMMANDS, tmp_path)
    assert all(text.splitlines()[-1].startswith("adpa: ") for text in said)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_parameter_is_an_option_with_help(name: str) -> None:
    registered = registered_as(name)
    command, options = load(registered), options_of(name)
    assert options.keys() == parameters_of(name).keys() | {"config", "report", "debug"}
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
    for parameter in parameters_of(name).values():
        assert group_of(parameter) is not Group.OTHER, parameter.name


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_name_is_cut_in_any_width(name: str, columns: int, runner: CliRunner) -> None:
    text = runner.invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": str(columns)}).output
    assert max(map(len, text.splitlines())) <= columns
    assert {word for option in options_of(name).values() for word in option.opts if word[0] == "-"} <= {*text.split()}


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("name", ["", "cache", *COMMANDS])
def test_no_line_and_no_word_is_cut(name: str, columns: int, runner: CliRunner) -> None:
    def shown(columns: int) -> str:
        done = runner.invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": str(columns)}, prog_name="adpa")
        assert done.exit_code == 0
        return done.stdout

    text = shown(columns)
    assert max(map(len, text.splitlines())) <= columns
    words, all_words = (
        {word for word in each.translate(dict.fromkeys(map(ord, "│─╭╮╰╯*"), " ")).split() if word[-1].isalpha()}
        for each in (text, shown(300))
    )
    assert words <= all_words


@pytest.mark.parametrize("name", ["", "cache", *COMMANDS])
def test_h_is_help(name: str, runner: CliRunner) -> None:
    by_letter, by_word = (runner.invoke(cli.app, [*name.split(), option]) for option in ("-h", "--help"))
    assert (by_letter.exit_code, by_letter.stdout) == (0, by_word.stdout)


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


def test_help_is_shown_by_a_terminal_that_knows_ascii_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = adpa("distill", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--kl-weight" in done.stdout


@pytest.mark.parametrize("command", ["ls", "verify", "gc", "pack", "export", "merge"])
def test_the_help_of_a_cache_command_names_its_arguments_plainly(command: str, runner: CliRunner) -> None:
    shown = runner.invoke(cli.app, ["cache", command, "--help"]).stdout
    arguments = "CACHE OTHER" if command == "merge" else "CACHE"
    assert shown.split("\n")[1].strip() == f"Usage: {shown.split()[1]} cache {command} [OPTIONS] {arguments}"
    assert "Directory or URL of" in " ".join(shown.split())
    assert "--no-" not in shown

"""The value of an option: what is empty is refused, ~ is expanded, choices may be written in any case."""

import os
import pwd
from pathlib import Path

import pytest
from tests.commands import COMMANDS, options_of, parameters_of
from typer.testing import CliRunner
from upath import UPath

from adpa import cli
from adpa.pipeline.options import kind_of
from adpa.pipeline.scoring.request import parse_responses

NEEDED = {"--teacher": "T", "--data": "d", "--cache": "c"}


def words(**options: str) -> list[str]:
    """The words of ``adpa precompute`` with what it needs and some options more."""
    given = NEEDED | {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    return ["precompute", *(f"{name}={value}" for name, value in given.items())]


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


@pytest.mark.parametrize("empty", ["", "  ", "\t"])
@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_value_is_refused_for_every_option(name: str, empty: str, runner: CliRunner) -> None:
    options = options_of(name)
    required = [option for option in options.values() if option.required]
    for option in options.values():
        if getattr(option, "is_flag", False):
            continue
        given = {one.name: "sft" for one in required} | {option.name: empty}
        places = [given[one.name] for one in options.values() if one.param_type_name == "argument"]
        named = [f"{options[each].opts[0]}={value}" for each, value in given.items() if each not in ARGUMENTS[name]]
        done = runner.invoke(cli.app, [*name.split(), *named, *places])
        label = option.metavar if option.name in ARGUMENTS[name] else option.opts[0]
        message = f"adpa: {label} {empty!r}: an empty value; write one, or leave the option out\n"
        assert (done.exit_code, done.stderr) == (2, message)


ARGUMENTS = {
    name: {each for each, option in options_of(name).items() if option.param_type_name == "argument"}
    for name in COMMANDS
}


USER = pwd.getpwuid(os.getuid())


@pytest.mark.parametrize(
    ("written", "place"),
    [("~", "/home/me"), ("~/x", "/home/me/x"), (f"~{USER.pw_name}/x", f"{USER.pw_dir}/x"), ("a~/x", "a~/x")],
)
def test_a_home_directory_is_expanded_as_the_shell_does(
    written: str,
    place: str,
    recorded: dict[str, object],
    runner: CliRunner,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    names = ("teacher", "reference", "student", "data", "cache", "split")
    done = runner.invoke(cli.app, words(**dict.fromkeys(names, written)))
    assert done.exit_code == 0, done.output
    on_command_line = {name: str(recorded.pop(name)) for name in names}
    assert on_command_line == dict.fromkeys(names[:-1], place) | {"split": written}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: '{written}'\n" for name in names))
    runner.invoke(cli.app, ["precompute", "--config", str(tmp_path / "run.yaml")])
    assert {name: str(recorded[name]) for name in names} == on_command_line


def test_a_url_and_an_unknown_user_stay_as_they_are(recorded: dict[str, object], runner: CliRunner) -> None:
    runner.invoke(cli.app, words(cache="s3://bucket/~/c", data="~nobody-here/d"))
    assert (str(recorded["cache"]), recorded["data"]) == ("s3://bucket/~/c", "~nobody-here/d")


def test_the_options_that_may_be_places_are_known() -> None:
    texts = {
        f"{name} {each}"
        for name in COMMANDS
        for each, parameter in parameters_of(name).items()
        if kind_of(parameter) is str
    }
    assert {text.split()[-1] for text in texts} == {
        "attn_implementation", "device", "engine_arg", "example", "lora_target", "map", "part", "quantization",
        "ray_address", "report_to", "response_set", "responses", "scoring", "set", "split", "validation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("option", "written", "name"),
    [
        ("engine", "HF", "hf"),
        ("dtype", "BFloat16", "bfloat16"),
        ("head_dtype", "Model", "model"),
        ("executor", "RAY", "ray"),
    ],
)
def test_a_choice_may_be_written_in_any_case(
    option: str, written: str, name: str, recorded: dict[str, object], runner: CliRunner
) -> None:
    done = runner.invoke(cli.app, words(**{option: written}))
    assert done.exit_code == 0, done.output
    assert recorded[option] == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": "seven"}, "--top-k seven; expected a whole number"),
        ({"top_k": "1e3"}, "--top-k 1e3; expected a whole number"),
        ({"temperature": "warm"}, "--temperature warm; expected a number"),
        ({"dtype": "int8"}, "--dtype int8; expected one of auto, float32, bfloat16, float16"),
        ({"teacher": "--data"}, "--teacher --data: an option in the place of a value; write a value for --teacher"),
        (
            {"chat_template_kwargs": "thinking"},
            "--chat-template-kwargs: 'thinking' is no JSON; write --chat-template-kwargs '{\"name\": value}'",
        ),
    ],
)
def test_a_value_that_cannot_be_read_is_one_line(
    options: dict[str, str], message: str, recorded: dict[str, object], runner: CliRunner
) -> None:
    done = runner.invoke(cli.app, words(**options))
    assert (done.exit_code, done.stderr) == (2, f"adpa: {message}\n")
    assert not recorded


def test_a_value_with_line_breaks_is_told_in_one_line(recorded: dict[str, object], runner: CliRunner) -> None:
    done = runner.invoke(cli.app, words(top_k="7\n\x1b[31m8"))
    assert done.stderr == "adpa: --top-k 7 \\x1b[31m8; expected a whole number\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "a command is missing: precompute, distill, evaluate, inspect, runs, lab, cache; see adpa --help"),
        ("train", "no command 'train'; see adpa --help"),
        ("distil", "no command 'distil'; did you mean distill?"),
        ("cache verfy", "no command 'verfy'; did you mean verify?"),
        ("--verson", "no option --verson; did you mean --version?"),
        ("precompute --max_length 3", "no option --max_length; did you mean --max-length?"),
        ("precompute -teacher x", "no option -teacher; did you mean --teacher?"),
        ("precompute --xyz", "no option --xyz; see adpa precompute --help"),
        ("precompute --teacher", "--teacher: its value is missing; see adpa precompute --help"),
        ("precompute --lossy=yes", "option '--lossy' does not take a value; see adpa precompute --help"),
        ("precompute --teacher T --data d", "--cache is missing; see adpa precompute --help"),
        ("distill --objective KD", "--student, --cache and --output are missing; see adpa distill --help"),
        ("inspect --cache c", "no option --cache; write CACHE without a name"),
        ("cache merge a", "OTHER is missing; see adpa cache merge --help"),
        ("cache ls a b", "unexpected argument b; see adpa cache ls --help"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(given: str, message: str, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, given.split())
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"adpa: {message}\n")


def test_a_command_alone_shows_shortly_what_it_needs(runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["distill"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert (
        done.stderr
        == """\
usage: adpa distill --objective <name> --student <str> --cache PATH|URL --output
    <path> [OPTIONS]
  --objective  The loss to minimise: sft, kd, dckd or adpa
  --student    The small model to train
  --cache      Directory of the teacher-signal cache
  --output     Directory for the trained student
adpa: --objective, --student, --cache and --output are missing; see adpa distill --help
"""
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_alone_names_what_it_needs(name: str, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, name.split())
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert lines[0].startswith(f"usage: adpa {name} ")
    assert lines[-1].startswith("adpa: ")
    needed = [option for option in options_of(name).values() if option.required]
    assert all((option.metavar if option.name in ARGUMENTS[name] else option.opts[0]) in lines[-1] for option in needed)
    assert len(lines) <= len(needed) + 4


def test_the_names_of_responses_may_be_written_in_any_case() -> None:
    assert parse_responses("Chosen,REJECTED", None) == ["chosen", "rejected"]
    assert parse_responses(" Sampled ", "S") == ["sampled"]

"""``--config``: a YAML file of options, and one line for everything in it that cannot be used."""

from pathlib import Path

import pytest
from tests.commands import adpa
from typer.testing import CliRunner

from adpa import cli

QUOTES = "put text such as yes, no, on and off in quotes"
NEEDED = "teacher: T\ndata: d\ncache: c\n"


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


@pytest.mark.parametrize(
    ("line", "option", "value"),
    [
        ("max_length: 3", "max_length", 3),
        ("max-length: 3", "max_length", 3),
        ("temperature: 1e-3", "temperature", 1e-3),
        ("temperature: 1", "temperature", 1.0),
        ("split: 0123", "split", "0123"),
        ("split: 12e4567890123456", "split", "12e4567890123456"),
        ("split: 1_000", "split", "1_000"),
        ("split: 2024-01-31", "split", "2024-01-31"),
        ("engine: HF", "engine", "hf"),
        (
            "chat-template-kwargs: {thinking: no, depth: 1.0e-1}",
            "chat_template_kwargs",
            {"thinking": False, "depth": 0.1},
        ),
        ("engine-arg: [seed=1, 2]", "engine_arg", ["seed=1", "2"]),
    ],
)
def test_a_value_is_read_as_on_the_command_line(
    line: str, option: str, value: object, recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(NEEDED + line)
    done = runner.invoke(cli.app, ["precompute", "--config", str(tmp_path / "run.yaml")])
    assert done.exit_code == 0, done.output
    assert recorded[option] == value
    assert type(recorded[option]) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- teacher", "found a list; expected a mapping; write lines such as name: value"),
        ("7", "found one value; expected a mapping; write lines such as name: value"),
        ("teacher", "found text; expected a mapping; write lines such as name: value"),
        ("", "found nothing; expected a mapping; write lines such as name: value"),
        ("# nothing yet", "found nothing; expected a mapping; write lines such as name: value"),
        (b"\xff\xfet\x00", "not a text file; name a YAML file in UTF-8"),
        ("teacher: [", "line 1: expected the node content, but found '<stream end>'; correct the YAML"),
        ("top-k: 7\nteacher: T\ntop-k: 8", "line 3: 'top-k' is there twice; correct the YAML"),
        ("top-k: 7\ntop_k: 8", "'top_k' is there twice; remove one"),
        ("tap-k: 7", "adpa precompute has no option 'tap-k'; did you mean top-k?"),
        ("max_lenth: 7", "adpa precompute has no option 'max_lenth'; did you mean max-length?"),
        ("colour: red", "adpa precompute has no option 'colour'; see adpa precompute --help"),
        ("config: other.yaml", "config: a file of options names no other one; write its options here"),
        ("top-k: seven", "top-k seven; expected a whole number"),
        ("top-k: 7.5", "top-k 7.5; expected a whole number"),
        (
            "top-k: true",
            f"top-k: found a truth value; expected a whole number; {QUOTES}",
        ),
        ("temperature: hot", "temperature hot; expected a number"),
        ("lossy: 1", "lossy 1; expected true or false"),
        (
            "teacher: on",
            f"teacher: found a truth value; expected a path or a name; {QUOTES}",
        ),
        ("teacher: [a, b]", "teacher: found a list; expected a path or a name"),
        ("cache: {path: c}", "cache: found a mapping; expected a path or a URL"),
        ("split: {a: b}", "split: found a mapping; expected text"),
        ("report: [a.json]", "report: found a list; expected a path"),
        ("engine-arg: {seed: 1}", "engine-arg: found a mapping; expected text"),
        ("engine-arg: [seed=1, [a]]", "engine-arg: found a list; expected text"),
        ("teacher:", "teacher has no value; write one, or remove the line"),
        ("split: ~", "split has no value; write one, or remove the line"),
        ("engine: vlm", "engine vlm; expected one of auto, hf, vllm; did you mean vllm?"),
        ("chat-template-kwargs: [1]", "chat-template-kwargs: found a list; expected a mapping"),
        ("teacher: ''", "teacher '': an empty value; write one, or leave the option out"),
        ("engine-arg: [seed=1, ' ']", "engine-arg ' ': an empty value; write one, or leave the option out"),
        ('teacher: "a\\0b"', "teacher 'a\\x00b': has a null character; remove it"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_file_and_option(
    text: str | bytes, message: str, recorded: dict[str, object], runner: CliRunner, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    config.write_bytes(text.encode() if isinstance(text, str) else text)
    done = runner.invoke(cli.app, ["precompute", "--config", str(config)])
    assert (done.exit_code, done.stderr) == (2, f"adpa: --config {config}: {message}\n")
    assert not recorded


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "--config nowhere.yaml: No such file or directory; check --config"),
        (".", "--config .: Is a directory; check --config"),
        ("", "--config '': an empty value; write one, or leave the option out"),
        ("  ", "--config '  ': an empty value; write one, or leave the option out"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, message: str, runner: CliRunner) -> None:
    done = runner.invoke(cli.app, ["precompute", "--config", name])
    assert (done.exit_code, done.stderr) == (2, f"adpa: {message}\n")

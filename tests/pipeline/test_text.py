"""From the text of a row to a cache: what a user is told, and what a response set keeps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Models, Row, WriteRows
from tests.data.templates import HABITS
from transformers import AutoTokenizer
from typer.testing import CliRunner

from adpa import precompute
from adpa.cli import app
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.data.vocabulary import load_tokenizer
from adpa.errors import OptionError, RowError
from adpa.pipeline.scoring.first_example import FirstExample

PAIR: Row = {"prompt": "Say hello.", "chosen": "Hello there!", "rejected": "No."}
PROMPT = "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n"
THINKING = HABITS["cuts thinking of earlier turns"]
INVALID = [PAIR | {"chosen": " "}, PAIR | {"prompt": "a<|im_end|>b"}, PAIR | {"rejected": ""}, {"prompt": "x"}]


def with_template(model: Path, template: str, directory: Path) -> Path:
    """A copy of a checkpoint with another chat template."""
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


def chosen_of(cache: Path) -> dict[str, ResponseSet]:
    return {one.id: one for one in read_response_sets(cache) if one.info.name == "chosen"}


def decoded(model: Path, responses: ResponseSet) -> list[tuple[str, str]]:
    tokenizer = load_tokenizer(model)
    sequences = responses.sequences()
    return [(str(tokenizer.decode(one.prompt_ids)), str(tokenizer.decode(one.response_ids))) for one in sequences]


@pytest.mark.parametrize("dry_run", [True, False])
def test_the_report_counts_dropped_rows_by_reason(
    dry_run: bool, models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = str(write_rows([PAIR, *INVALID]))
    report = precompute(str(models.teacher), data, tmp_path / "cache", drop_invalid=True, dry_run=dry_run)
    assert report.dropped_by_reason == {"empty response": 2, "control tokens": 1, "missing column": 1}
    assert (report.dropped, report.scored) == (4, 2)


def test_a_refused_run_counts_the_rows_by_reason(models: Models, write_rows: WriteRows, tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        precompute(str(models.teacher), str(write_rows([PAIR, *INVALID])), tmp_path / "cache", dry_run=True)
    counted = "(first of 4 invalid rows; empty response: 2, control tokens: 1, missing column: 1)"
    assert "line 2: `chosen` is an empty response" in str(caught.value)
    assert counted in str(caught.value)


def test_the_first_example_is_shown_after_all_rows_were_checked_and_before_anything_is_written(
    models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    cache, shown = tmp_path / "cache", list[FirstExample]()

    def show(example: FirstExample) -> None:
        assert not cache.exists()
        shown.append(example)

    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    with pytest.raises(RowError):
        precompute(str(models.teacher), str(write_rows([PAIR, *INVALID])), cache, on_example=show)
    assert shown == []
    precompute(str(models.teacher), str(write_rows([PAIR])), cache, on_example=show)
    messages = [{"role": "user", "content": "Say hello."}]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert shown == [FirstExample(prompt, "Hello there!", "<|im_end|>", 2)]


def test_a_first_example_that_was_cut_has_no_end(models: Models, write_rows: WriteRows, tmp_path: Path) -> None:
    shown = list[FirstExample]()
    options: dict[str, Any] = {"max_prompt_length": 3, "max_length": 4, "dry_run": True}
    precompute(str(models.teacher), str(write_rows([PAIR])), tmp_path / "cache", on_example=shown.append, **options)
    assert shown == [FirstExample("istant\n", "H", None, 2)]


def test_the_command_prints_the_first_example_with_its_parts_apart(
    models: Models, write_rows: WriteRows, tmp_path: Path, runner: CliRunner
) -> None:
    options = ["--teacher", str(models.teacher), "--data", str(write_rows([PAIR])), "--cache", str(tmp_path / "cache")]
    result = runner.invoke(app, ["precompute", *options, "--dry-run"])
    lines = [line.strip("│ ") for line in result.stdout.splitlines()]
    assert lines[0] == "First example, as the models read it"
    assert "chosen    │ Hello there!" in lines
    assert "end token │ <|im_end|> (id 2)" in lines
    assert lines.index("end token │ <|im_end|> (id 2)") < lines.index("adpa precompute --dry-run")


def test_the_templates_arguments_make_another_response_set(
    models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    teacher = with_template(models.teacher, THINKING, tmp_path / "teacher")
    cache, data = tmp_path / "cache", str(write_rows([PAIR]))
    thinking = precompute(str(teacher), data, cache)
    plain = precompute(str(teacher), data, cache, chat_template_kwargs={"enable_thinking": False})
    sets = chosen_of(cache)
    assert decoded(teacher, sets[thinking.responses["chosen"]]) == [
        (
            "<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\nHello there!<|im_end|>",
        )
    ]
    assert decoded(teacher, sets[plain.responses["chosen"]]) == [
        (PROMPT + "<think>\n\n</think>\n", "Hello there!<|im_end|>")
    ]
    arguments = [sets[done.responses["chosen"]].info.chat_template_kwargs for done in (thinking, plain)]
    assert arguments == [{}, {"enable_thinking": False}]


def test_arguments_that_change_no_token_still_name_another_set(
    models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    teacher = with_template(models.teacher, THINKING, tmp_path / "teacher")
    cache, data = tmp_path / "cache", str(write_rows([PAIR]))
    first = precompute(str(teacher), data, cache)
    second = precompute(str(teacher), data, cache, chat_template_kwargs={"enable_thinking": True})
    assert first.responses["chosen"] != second.responses["chosen"]
    assert (second.scored, second.reused) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"enable_thnking": False}, "the chat template of .* takes no 'enable_thnking'"),
        ({"messages": []}, "'messages' is adpa's own to decide"),
        ({"add_generation_prompt": False}, "'add_generation_prompt' is adpa's own to decide"),
    ],
)
def test_arguments_that_no_template_takes_are_refused(
    arguments: Row, problem: str, models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=f"--chat-template-kwargs: {problem}"):
        precompute(str(models.teacher), str(write_rows([PAIR])), tmp_path / "cache", chat_template_kwargs=arguments)


def test_arguments_come_as_json_or_from_yaml(
    models: Models, write_rows: WriteRows, tmp_path: Path, runner: CliRunner
) -> None:
    teacher = with_template(models.teacher, THINKING, tmp_path / "teacher")
    data, cache, config = write_rows([PAIR]), tmp_path / "cache", tmp_path / "options.yaml"
    config.write_text("chat-template-kwargs:\n  enable_thinking: false\n")
    options = ["precompute", "--teacher", str(teacher), "--data", str(data), "--cache", str(cache)]
    for given in (["--chat-template-kwargs", '{"enable_thinking": false}'], ["--config", str(config)]):
        shutil.rmtree(cache, ignore_errors=True)
        assert runner.invoke(app, [*options, *given]).exit_code == 0
        (chosen,) = chosen_of(cache).values()
        assert chosen.info.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("text", ["enable_thinking=false", "[1]", "", "{", "7", '{"a": NaN}', '{"a": 1e999}'])
def test_arguments_that_are_no_json_object_are_refused(text: str, tmp_path: Path, runner: CliRunner) -> None:
    options = ["precompute", "--teacher", "T", "--data", "D", "--cache", str(tmp_path)]
    done = runner.invoke(app, [*options, "--chat-template-kwargs", text])
    assert (done.exit_code, ("is no JSON" if text else "an empty value") in done.stderr) == (2, True)


def test_a_mapping_in_a_file_of_options_that_json_lacks_is_refused(tmp_path: Path, runner: CliRunner) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("chat-template-kwargs:\n  date: 2024-01-01\n")
    options = ["precompute", "--teacher", "T", "--data", "D", "--cache", str(tmp_path), "--config", str(config)]
    done = runner.invoke(app, options)
    assert (done.exit_code, "is no JSON" in done.stderr) == (2, True)


def test_the_first_example_cannot_control_the_terminal(
    models: Models, write_rows: WriteRows, tmp_path: Path, runner: CliRunner
) -> None:
    data = write_rows([PAIR | {"prompt": "\x1b[31mred\u200b"}])
    options = ["--teacher", str(models.teacher), "--data", str(data), "--cache", str(tmp_path / "cache")]
    shown = runner.invoke(app, ["precompute", *options, "--dry-run"]).stdout
    assert "\x1b" not in shown
    assert "␛[31mred\\u{200b}" in shown


def test_rendered_prompts_make_a_set_that_says_so(models: Models, write_rows: WriteRows, tmp_path: Path) -> None:
    data, cache = str(write_rows([PAIR | {"prompt": PROMPT}])), tmp_path / "cache"
    precompute(str(models.teacher), data, cache, rendered=True)
    (chosen,) = chosen_of(cache).values()
    assert chosen.info.rendered
    assert decoded(models.teacher, chosen) == [(PROMPT, "Hello there!<|im_end|>")]
    with pytest.raises(OptionError, match="--chat-template-kwargs with --rendered"):
        precompute(str(models.teacher), data, cache, rendered=True, chat_template_kwargs={"a": 1})


def test_conversations_with_tools_are_scored(models: Models, write_rows: WriteRows, tmp_path: Path) -> None:
    teacher = with_template(models.teacher, HABITS["tools"], tmp_path / "teacher")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lyon"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "It rains?", "parameters": {}}}
    asked = {"role": "user", "content": "Rain in Lyon?"}
    rows: list[Row] = [
        {
            "prompt": [asked],
            "chosen": [{"role": "assistant", "tool_calls": [call]}],
            "rejected": "No.",
            "tools": [tool],
        },
        {
            "prompt": [asked, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "7 mm"}],
            "chosen": "It rains.",
            "rejected": "No.",
        },
    ]
    rows = [row | {"tools": [tool]} for row in rows]
    cache = tmp_path / "cache"
    report = precompute(str(teacher), str(write_rows(rows)), cache)
    assert report.scored == 4
    (chosen,) = chosen_of(cache).values()
    asked_first, asked_again = sorted(decoded(teacher, chosen), key=lambda pair: len(pair[0]))
    assert asked_first[1] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call><|im_end|>'
    assert '"description": "It rains?"' in asked_first[0]
    assert asked_first[1] in asked_again[0]
    assert asked_again[0].endswith("<|im_start|>tool\n7 mm<|im_end|>\n<|im_start|>assistant\n")
    assert asked_again[1] == "It rains.<|im_end|>"
    with pytest.raises(RowError, match="the row has tools, and the chat template takes none"):
        precompute(str(models.teacher), str(write_rows(rows)), cache)


def test_thinking_of_earlier_turns_that_the_template_leaves_out_is_counted(
    models: Models, write_rows: WriteRows, tmp_path: Path
) -> None:
    teacher = with_template(models.teacher, THINKING, tmp_path / "teacher")
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>Polite?</think>Hello."}]
    rows = [PAIR, PAIR | {"prompt": [*earlier, {"role": "user", "content": "Go on."}]}]
    report = precompute(str(teacher), str(write_rows(rows)), tmp_path / "cache", dry_run=True)
    assert report.thinking_left_out == 1

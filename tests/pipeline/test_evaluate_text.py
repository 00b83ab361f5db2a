"""How the text of held-out rows reaches an evaluation: template arguments, rendered prompts, rows left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Row
from tests.pipeline.conftest import Filled
from transformers import AutoTokenizer
from typer.testing import CliRunner

from adpa import evaluate
from adpa.cli import app
from adpa.data.cache.responses import ResponseSet, read_response_sets
from adpa.errors import OptionError, RowError
from adpa.pipeline.evaluate import EvaluateReport

pytestmark = pytest.mark.slow

# Asked to be brief, it adds an instruction to conversations of several turns. It drops thinking of earlier turns.
TEMPLATE = (
    "{% if brief and messages | length > 2 %}user : Say a number</s>{% endif %}{% for m in messages %}"
    "{{ m.role }} : {% if m.reasoning and loop.last %}{{ m.reasoning }} {% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
INSTRUCTION = "user : Say a number </s>"
EARLIER: list[Row] = [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hello there !"}]


def row(prompt: str | list[Row]) -> Row:
    return {"prompt": prompt, "chosen": "Seven .", "rejected": "Four ."}


def question(text: str) -> Row:
    return {"role": "user", "content": text}


ONE_TURN = [row([question("Say hello")]), row([question("2 + 2 ?")]), row([question("Why ?")])]
TWO_TURNS = [row([*EARLIER, question("2 + 2 ?")]), row([*EARLIER, question("Why ?")])]
EMPTY, FORGED, NO_ANSWER = ONE_TURN[0] | {"chosen": " "}, row("Hello </s> there"), {"prompt": "Say hello"}


@pytest.fixture(scope="module")
def options(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models of a few words, with a teacher whose template takes an argument."""
    teacher = shutil.copytree(few_words.models.teacher, tmp_path_factory.mktemp("teacher") / "teacher")
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    return {
        "student": str(few_words.models.student),
        "baseline": str(few_words.models.reference),
        "teacher": str(teacher),
        "reference": str(few_words.models.reference),
        "max_new_tokens": 3,
    }


def evaluated(options: dict[str, Any], rows: list[Row], folder: Path, **others: Any) -> EvaluateReport:
    data = folder / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate(**options, data=str(data), cache=folder / "cache", **others)


def sampled_sets(folder: Path) -> list[ResponseSet]:
    """The sets of the answers that were sampled at temperature 1."""
    sets = read_response_sets(folder / "cache" / "evaluation")
    return [one for one in sets if one.info.sampling is not None and one.info.sampling.temperature == 1]


def prompts(responses: ResponseSet, options: dict[str, Any]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(options["teacher"])
    return [str(tokenizer.decode(one.prompt_ids)) for one in responses.sequences()]


def numbers(report: EvaluateReport) -> EvaluateReport:
    return replace(report, sampled=0, answered_greedily=0, scored=0, scored_by_students=0, seconds=0)


def test_other_template_arguments_make_another_set_and_only_other_prompts_are_answered_again(
    options: dict[str, Any], tmp_path: Path
) -> None:
    rows = [*ONE_TURN, *TWO_TURNS]
    first = evaluated(options, rows, tmp_path)
    assert first.sampled == 2 * 5
    before = {one.id for one in sampled_sets(tmp_path)}
    brief = evaluated(options, rows, tmp_path, chat_template_kwargs={"brief": True})
    assert brief.sampled == 2 * 2
    added = [one for one in sampled_sets(tmp_path) if one.id not in before]
    assert len(before) == len(added) == 2
    for responses in added:
        assert responses.info.chat_template_kwargs == {"brief": True}
        assert sorted(text.startswith(INSTRUCTION) for text in prompts(responses, options)) == [False] * 3 + [True] * 2
    again = evaluated(options, rows, tmp_path)
    assert (again.sampled, again.scored, numbers(again)) == (0, 0, numbers(first))


def test_the_command_takes_template_arguments_as_json(
    options: dict[str, Any], runner: CliRunner, tmp_path: Path
) -> None:
    data = tmp_path / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in TWO_TURNS))
    words = {"data": data, "cache": tmp_path / "cache", "chat-template-kwargs": '{"brief": true}'} | options
    arguments = [part for name, value in words.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert runner.invoke(app, ["evaluate", *arguments], catch_exceptions=False).exit_code == 0
    for responses in sampled_sets(tmp_path):
        assert responses.info.chat_template_kwargs == {"brief": True}
        assert all(text.startswith(INSTRUCTION) for text in prompts(responses, options))
    done = runner.invoke(app, ["evaluate", *arguments, "--chat-template-kwargs", "brief=true"])
    assert (done.exit_code, "is no JSON" in done.output) == (2, True)


def test_rendered_prompts_get_the_answers_of_their_conversations(options: dict[str, Any], tmp_path: Path) -> None:
    """The same tokens, whoever rendered them: nothing is sampled again."""
    messages = evaluated(options, ONE_TURN, tmp_path)
    texts = [f"user : {one['prompt'][0]['content']}</s>assistant : " for one in ONE_TURN]
    rendered = evaluated(options, [row(text) for text in texts], tmp_path, rendered=True)
    assert (rendered.sampled, numbers(rendered)) == (0, numbers(messages))
    assert sorted(one.info.rendered for one in sampled_sets(tmp_path)) == [False, False, True, True]
    with pytest.raises(OptionError, match="--chat-template-kwargs with --rendered"):
        evaluated(options, ONE_TURN, tmp_path, rendered=True, chat_template_kwargs={"brief": True})


def test_control_tokens_are_refused_unless_they_are_allowed(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"line 4: .*'</s>'"):
        evaluated(options, [*ONE_TURN, FORGED], tmp_path)
    assert not (tmp_path / "cache").exists()
    report = evaluated(options, [*ONE_TURN, FORGED], tmp_path, allow_control_tokens=True)
    assert (report.prompts, report.dropped) == (4, 0)
    said = [text for text in prompts(sampled_sets(tmp_path)[0], options) if "Hello </s> there" in text]
    assert said == ["user : Hello </s> there </s> assistant :"]


@pytest.mark.parametrize("allowed", [False, True])
def test_rows_left_out_are_counted_by_reason(allowed: bool, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [EMPTY, *ONE_TURN, FORGED, NO_ANSWER, EMPTY]
    report = evaluated(options, rows, tmp_path, drop_invalid=True, allow_control_tokens=allowed)
    control_tokens = {} if allowed else {"control tokens": 1}
    assert report.dropped_by_reason == {"empty response": 2, "pairs and prompts mixed": 1, **control_tokens}
    assert (report.prompts, report.dropped) == (3 + allowed, 4 - allowed)


def test_thinking_that_the_template_leaves_out_is_counted(options: dict[str, Any], tmp_path: Path) -> None:
    thinking = [EARLIER[0], EARLIER[1] | {"reasoning": "Because"}, question("2 + 2 ?")]
    report = evaluated(options, [*ONE_TURN, row(thinking)], tmp_path)
    assert (report.thinking_left_out, report.prompts) == (1, 4)
    assert all("Because" not in text for text in prompts(sampled_sets(tmp_path)[0], options))

"""Rows without responses are prompts, where only a student's own responses are wanted."""

from pathlib import Path
from typing import Any

import pytest
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row
from tests.data.pairs import explicit
from tests.data.row_files import save_dataset, write_parquet
from transformers import PreTrainedTokenizerBase

from adpa.data.chat_template import ChatTemplate
from adpa.data.encoding import EncodedPair, Encoder
from adpa.data.preferences import PreferencePair, parse_pair
from adpa.data.rows import read_rows
from adpa.errors import DataError, RowError

PROMPT = [SYSTEM, *EARLIER_TURN, QUESTION]
ASKED = QUESTION["content"]


def prompt_alone(row: Row, rendered: bool = False) -> PreferencePair:
    pair = parse_pair("prompts.jsonl line 2", row, rendered, prompts_alone=True)
    assert (pair.chosen, pair.rejected, pair.responses) == ({}, {}, {})
    return pair


def refusal(row: Row) -> str:
    with pytest.raises(RowError) as caught:
        parse_pair("prompts.jsonl line 2", row, prompts_alone=True)
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT},
        {"messages": PROMPT, "source": "a"},
        {"messages": [*PROMPT, CHOSEN]},
        {"conversations": [{"from": "human", "value": ASKED}], "system": SYSTEM["content"]},
        {"instruction": ASKED, "input": "", "output": "Paris.", "system": SYSTEM["content"]},
        {"prompt": PROMPT, "chosen": None, "rejected": None},
    ],
)
def test_a_prompt_alone_has_the_forms_of_a_pairs_prompt(row: Row) -> None:
    prompt = prompt_alone(row).prompt
    assert (prompt[0], prompt[-1]) == (SYSTEM, QUESTION)


def test_a_text_of_human_and_assistant_is_a_prompt_alone() -> None:
    row = {"prompt": f"\n\nHuman: Hello.\n\nAssistant: Hi!\n\nHuman: {ASKED}\n\nAssistant:"}
    assert prompt_alone(row).prompt == (*EARLIER_TURN, QUESTION)


def test_a_rendered_prompt_may_be_alone() -> None:
    assert prompt_alone({"prompt": "<|user|>Hi<|assistant|>"}, rendered=True).prompt == "<|user|>Hi<|assistant|>"


def test_the_example_id_is_a_digest_of_the_prompt() -> None:
    one = prompt_alone({"prompt": ASKED}).example_id
    assert one == prompt_alone({"prompt": [QUESTION]}).example_id == "b34b9fe7aaf1bca6"
    others: list[Row] = [{"prompt": PROMPT}, {"prompt": "Hi"}, {"prompt": ASKED, "tools": [{"name": "search"}]}]
    assert one not in {prompt_alone(row).example_id for row in others}
    assert one != parse_pair("here", explicit([QUESTION])).example_id


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": ASKED, "chosen": "Paris."}, "found the columns prompt, chosen; expected `rejected`"),
        ({"prompt": ASKED, "chosen": "Paris.", "rejected": None}, "`rejected` is null"),
        ({"prompt": ASKED, "accepted": "Paris.", "refused": "Lyon."}, "pass --map chosen=accepted,rejected=refused"),
        ({"question": ASKED}, "found no `prompt` among the columns question; pass --map prompt=question"),
        ({"text": ASKED}, "found no `prompt` among the columns text; add `prompt`"),
        ({"prompt": ""}, "`prompt` is ''; write the prompt into it"),
        ({"prompt": [QUESTION, CHOSEN]}, "the prompt ends with the assistant's message; expected the user's"),
        ({"prompt": ASKED, "context": "Europe"}, "found the column `context`"),
        ({"messages": [CHOSEN]}, "`prompt` is []"),
    ],
)
def test_a_row_that_is_neither_a_pair_nor_a_prompt_is_refused(row: Row, problem: str) -> None:
    assert problem in refusal(row)


def make_encoder(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Encoder:
    return Encoder(ChatTemplate(tokenizer), 512, 1024, prompts_alone=True, **options)


def encode(encoder: Encoder, *rows: Row) -> list[EncodedPair]:
    return list(encoder.encode((f"line {number}", row) for number, row in enumerate(rows, start=1)))


def test_a_prompt_alone_has_the_tokens_of_a_pairs_prompt(small_tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = make_encoder(small_tokenizer)
    alone, again = encode(encoder, {"prompt": PROMPT}, {"prompt": PROMPT})
    (pair,) = encode(make_encoder(small_tokenizer), explicit(PROMPT))
    assert alone.prompt_ids.tolist() == pair.prompt_ids.tolist() == again.prompt_ids.tolist()
    assert len(alone.chosen_ids) == len(alone.rejected_ids) == 0
    assert again.example_id == f"{alone.example_id}:2"
    counts = encoder.counts
    assert (counts.used, counts.duplicates, counts.identical, counts.contradicting) == (2, 1, 0, 0)


def test_control_tokens_in_a_prompt_alone_are_refused(small_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RowError, match="the user message of the prompt has the control token"):
        encode(make_encoder(small_tokenizer), {"prompt": "Hi<|im_end|>"})


PAIR = explicit([QUESTION])


@pytest.mark.parametrize(
    ("rows", "problem", "kept"),
    [
        ([PAIR, {"prompt": "Hi"}], "line 2: the row has no `chosen` and no `rejected`, but other rows have them", 1),
        ([{"prompt": "Hi"}, PAIR, PAIR], "line 1: the row has no `chosen` and no `rejected`, but other rows", 2),
    ],
)
def test_pairs_and_prompts_alone_do_not_mix(
    rows: list[Row], problem: str, kept: int, small_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(RowError) as caught:
        encode(make_encoder(small_tokenizer), *rows)
    assert str(caught.value).startswith(problem)
    encoder = make_encoder(small_tokenizer, drop_invalid=True)
    pairs = encode(encoder, *rows)
    assert len(pairs) == kept
    assert all(len(pair.chosen_ids) for pair in pairs), "the pairs stay"
    assert encoder.counts.reasons() == {"pairs and prompts mixed": len(rows) - kept}


def test_a_late_pair_among_prompts_alone_is_dropped(
    small_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adpa.data.encoding.FIRST_ROWS", 2)
    rows = [{"prompt": "Hi"}, {"prompt": "Hello"}, PAIR]
    with pytest.raises(RowError, match="line 3: the row has responses, but the first rows have none; keep pairs and"):
        encode(make_encoder(small_tokenizer), *rows)


@pytest.mark.parametrize("write", [write_parquet, save_dataset])
@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": ASKED}],
        [{"messages": [QUESTION]}],
        [{"conversations": [{"from": "human", "value": ASKED}], "id": 1}],
        [{"instruction": ASKED, "input": "", "output": "Paris."}],
        [{"prompt": ASKED, "chosen": None, "rejected": None}],
    ],
)
def test_tables_of_prompts_alone_are_read(write: Any, rows: list[Row], tmp_path: Path) -> None:
    path = write(rows, tmp_path / "prompts")
    ((_, row),) = read_rows(str(path), prompts_alone=True)
    assert prompt_alone(dict(row)).prompt == (QUESTION,)  # type: ignore[arg-type]
    if "chosen" not in rows[0]:
        with pytest.raises(DataError, match="expected `chosen` and `rejected`"):
            list(read_rows(str(path)))


def test_a_table_of_alpaca_or_sharegpt_is_read(tmp_path: Path) -> None:
    alpaca = {"instruction": "Hi", "input": "you", "output": "a", "rejected": "b", "history": [["c", "d"]]}
    sharegpt = {"conversations": [{"from": "human", "value": ASKED}], "chosen": CHOSEN, "rejected": REJECTED}
    for row, length in ((alpaca, 3), (sharegpt, 1)):
        ((where, read),) = read_rows(str(write_parquet([row], tmp_path / f"prefs-{length}")))
        assert parse_pair(where, read) == parse_pair(where, row)
        assert len(parse_pair(where, read).prompt) == length


@pytest.mark.parametrize(
    ("header", "found", "fix"),
    [
        ("Question,Note", "Question, Note", "pass --map prompt=Question"),
        ("id,text", "id, text", "name it with --map prompt=NAME"),
        ("user query,Query", "user query, Query", "pass --map prompt=Query"),
    ],
)
def test_a_table_without_the_prompt_says_which_columns_it_has(
    header: str, found: str, fix: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"{header}\nWhy?,x\n")
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path), prompts_alone=True))
    assert str(caught.value) == f"{path}: found the columns {found}; expected `prompt`; {fix}"

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from adpa.data.preferences import PreferencePair, parse_pair, read_rows
from adpa.errors import DataError

Row = dict[str, Any]

SYSTEM = {"role": "system", "content": "Answer in one word."}
QUESTION = {"role": "user", "content": "What is the capital of France? 🗼"}
CHOSEN = {"role": "assistant", "content": "Paris."}
REJECTED = {"role": "assistant", "content": "Lyon, I believe."}
EARLIER_TURN = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]

CONVERSATIONS = {
    "one question": [QUESTION],
    "a system message": [SYSTEM, QUESTION],
    "several turns": [*EARLIER_TURN, QUESTION],
    "several turns after a system message": [SYSTEM, *EARLIER_TURN, QUESTION],
}


def explicit(prompt: list[Row]) -> Row:
    return {"prompt": prompt, "chosen": [CHOSEN], "rejected": [REJECTED]}


def responses_as_strings(prompt: list[Row]) -> Row:
    return {"prompt": prompt, "chosen": CHOSEN["content"], "rejected": REJECTED["content"]}


def implicit(prompt: list[Row]) -> Row:
    """As in argilla/dpo-mix-7k."""
    return {"chosen": [*prompt, CHOSEN], "rejected": [*prompt, REJECTED], "dataset": "argilla", "chosen_rating": 5.0}


def prompt_and_whole_conversations(prompt: list[Row]) -> Row:
    return {"prompt": prompt} | implicit(prompt)


def prompt_string_and_whole_conversations(prompt: list[Row]) -> Row:
    """As in HuggingFaceH4/ultrafeedback_binarized, which has `messages` too."""
    first_question = next(message["content"] for message in prompt if message["role"] == "user")
    return {"prompt_id": "f0e3", "prompt": first_question, "messages": [*prompt, CHOSEN]} | implicit(prompt)


FORMS = [
    explicit,
    responses_as_strings,
    implicit,
    prompt_and_whole_conversations,
    prompt_string_and_whole_conversations,
]


def read_pairs(source: Path | str, split: str | None = None) -> list[PreferencePair]:
    return [parse_pair(where, row) for where, row in read_rows(str(source), split)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_every_form_of_a_row_gives_the_same_pair(form: Callable[[list[Row]], Row], conversation: str) -> None:
    prompt = CONVERSATIONS[conversation]
    pair = parse_pair("here", form(prompt))
    assert pair == PreferencePair("here", pair.example_id, tuple(prompt), "Paris.", "Lyon, I believe.")
    assert pair.example_id == parse_pair("there", explicit(prompt)).example_id


def test_a_row_of_three_strings_is_a_question_and_two_answers() -> None:
    row = {"prompt": QUESTION["content"], "chosen": CHOSEN["content"], "rejected": REJECTED["content"]}
    assert parse_pair("here", row) == parse_pair("here", explicit([QUESTION]))


def test_equal_answers_to_one_question_still_are_a_pair() -> None:
    pair = parse_pair("here", {"chosen": [QUESTION, CHOSEN], "rejected": [QUESTION, CHOSEN]})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((QUESTION,), "Paris.", "Paris.")


def test_keys_of_a_message_other_than_role_and_content_are_left_out() -> None:
    extra = {"prompt": [QUESTION | {"name": "Ann", "tool_calls": None}], "chosen": [CHOSEN], "rejected": [REJECTED]}
    assert parse_pair("here", extra) == parse_pair("here", explicit([QUESTION]))


@pytest.mark.parametrize(
    "changed",
    [
        explicit([SYSTEM, QUESTION]),
        explicit([QUESTION | {"content": "What is the capital of Gaul?"}]),
        explicit([QUESTION]) | {"chosen": "Paris!"},
        explicit([QUESTION]) | {"rejected": "Lyon."},
        {"prompt": [QUESTION], "chosen": [REJECTED], "rejected": [CHOSEN]},
    ],
)
def test_the_example_id_changes_with_the_content(changed: Row) -> None:
    assert parse_pair("here", changed).example_id != parse_pair("here", explicit([QUESTION])).example_id


def write_jsonl(rows: list[Row], path: Path) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return path


def write_jsonl_in_json_file(rows: list[Row], path: Path) -> Path:
    return write_jsonl(rows, path).rename(path.with_suffix(".json"))


def write_jsonl_with_bom(rows: list[Row], path: Path) -> Path:
    path = write_jsonl(rows, path)
    path.write_text("\ufeff" + path.read_text())
    return path


def write_json(rows: list[Row], path: Path) -> Path:
    path = path.with_suffix(".json")
    path.write_text("\n" + json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return path


def write_parquet(rows: list[Row], path: Path) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_parquet_by_datasets(rows: list[Row], path: Path) -> Path:
    path = path.with_suffix(".parquet")
    Dataset.from_list(rows).to_parquet(path)
    return path


def save_dataset(rows: list[Row], path: Path) -> Path:
    Dataset.from_list(rows).save_to_disk(path)
    return path


def save_dataset_dict(rows: list[Row], path: Path) -> Path:
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path)
    return path


WRITERS = [
    write_jsonl,
    write_jsonl_in_json_file,
    write_jsonl_with_bom,
    write_json,
    write_parquet,
    write_parquet_by_datasets,
    save_dataset,
    save_dataset_dict,
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_same_pairs(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    rows = [prompt_and_whole_conversations(prompt) for prompt in CONVERSATIONS.values()]
    pairs = read_pairs(write(rows, tmp_path / "prefs"))
    expected = [parse_pair("", row) for row in rows]
    assert [pair.example_id for pair in pairs] == [pair.example_id for pair in expected]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in expected
    ]


def test_the_example_id_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [explicit(prompt) for prompt in CONVERSATIONS.values()]
    forward, backward = (
        read_pairs(write_jsonl(some, tmp_path / name)) for name, some in (("a", rows), ("b", rows[::-1]))
    )
    assert [pair.example_id for pair in forward] == [pair.example_id for pair in backward][::-1]
    assert len({pair.example_id for pair in forward}) == len(rows)


def test_real_preferences_that_nobody_here_wrote_are_read(preference_rows: list[Row], tmp_path: Path) -> None:
    pairs = read_pairs(write_jsonl(preference_rows, tmp_path / "prefs"))
    assert [list(pair.prompt) for pair in pairs] == [row["prompt"] for row in preference_rows]
    assert [pair.rejected for pair in pairs] == [row["rejected"][0]["content"] for row in preference_rows]


def test_a_pair_knows_the_line_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n" + json.dumps(explicit([QUESTION])) + "\n\n\n" + json.dumps(implicit([QUESTION])))
    assert [pair.where for pair in read_pairs(path)] == [f"{path} line 2", f"{path} line 5"]


@pytest.mark.parametrize("write", [write_json, write_parquet, save_dataset])
def test_a_pair_knows_the_row_it_was_read_from(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    path = write([explicit([QUESTION]), explicit([SYSTEM, QUESTION])], tmp_path / "prefs")
    assert [pair.where for pair in read_pairs(path)] == [f"{path} row 1", f"{path} row 2"]


def save_two_splits(folder: Path) -> Path:
    splits = {"train_prefs": explicit([QUESTION]), "test_prefs": explicit([SYSTEM, QUESTION])}
    DatasetDict({name: Dataset.from_list([row]) for name, row in splits.items()}).save_to_disk(folder)
    return folder


def test_the_split_that_is_named_is_read(tmp_path: Path) -> None:
    (pair,) = read_pairs(save_two_splits(tmp_path / "prefs"), "test_prefs")
    assert pair.prompt == (SYSTEM, QUESTION)


def test_a_split_of_data_that_has_none_is_refused(tmp_path: Path) -> None:
    file = write_jsonl([explicit([QUESTION])], tmp_path / "prefs")
    Dataset.from_list([explicit([QUESTION])]).save_to_disk(tmp_path / "saved")
    for source in (file, tmp_path / "saved"):
        with pytest.raises(DataError, match=r"found --split train; .* has no splits"):
            read_pairs(source, "train")


@pytest.mark.parametrize(("split", "choice"), [(None, "no --split"), ("test", "--split test")])
def test_a_split_that_is_missing_is_refused_with_the_names_there_are(
    split: str | None, choice: str, tmp_path: Path
) -> None:
    folder = save_two_splits(tmp_path / "prefs")
    with pytest.raises(DataError) as caught:
        read_pairs(folder, split)
    assert str(caught.value).startswith(f"{folder}: found {choice}; expected one of train_prefs, test_prefs")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("missing.jsonl", None, "no such file or directory"),
        ("missing", None, "no such file or directory"),
        ("prefs.jsonl", b"", "found no rows"),
        ("prefs.jsonl", b"\n \n", "found no rows"),
        ("prefs.json", b"[]", "found no rows"),
        ("prefs.parquet", b"", "expected a Parquet file"),
        ("prefs.parquet", b"PAR1 and no more", "expected a Parquet file"),
        ("prefs.jsonl", '{"prompt": "Où?"}'.encode("latin-1"), "expected UTF-8 text"),
        ("prefs.jsonl.gz", b"\x1f\x8b\x08\x00", "expected UTF-8 text"),
    ],
)
def test_a_file_that_holds_no_preferences_is_refused_by_name(
    name: str, content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}: {problem}")


@pytest.mark.parametrize("content", ["nothing", "other files", "no rows", "broken rows"])
def test_a_directory_that_holds_no_dataset_is_refused_by_name(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "prefs"
    folder.mkdir()
    if content == "other files":
        write_jsonl([explicit([QUESTION])], folder / "prefs")
    elif content == "no rows":
        Dataset.from_list([]).save_to_disk(folder)
    elif content == "broken rows":
        save_dataset([explicit([QUESTION])], folder)
        next(folder.glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError) as caught:
        read_pairs(folder)
    assert str(caught.value).startswith(f"{folder}: expected a directory saved by datasets.save_to_disk")


GOOD_LINE = json.dumps(explicit([QUESTION]))


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("prefs.jsonl", f'{GOOD_LINE}\n\n{{"prompt": \n{GOOD_LINE}\n', 3),
        ("prefs.jsonl", f"{GOOD_LINE}\n{GOOD_LINE[:40]}", 2),
        ("prefs.json", f"[{GOOD_LINE},\n{GOOD_LINE},\nnull null]", 3),
        ("prefs.json", "{\n" + GOOD_LINE[1:], 1),
    ],
)
def test_broken_json_is_refused_with_its_line(name: str, text: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path} line {line}: broken JSON: ")


def test_the_lines_before_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text(f"{GOOD_LINE}\n{{\n")
    rows = read_rows(str(path))
    assert next(rows) == (f"{path} line 1", explicit([QUESTION]))
    with pytest.raises(DataError):
        next(rows)


SHAREGPT = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi!"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "search"}}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(["chosen", "rejected"], "found a list; expected an object", id="a list"),
        pytest.param("text", "found a str; expected an object", id="a string"),
        pytest.param(
            {"prompt": "Hi", "chosen": "Hello"}, "found the columns prompt, chosen; expected `rejected`", id="no column"
        ),
        pytest.param(
            {"instruction": "Hi", "output": ["Hello"]}, "found the columns instruction, output", id="other columns"
        ),
        pytest.param(explicit([QUESTION]) | {"chosen": None}, "expected `chosen`", id="chosen is null"),
        pytest.param(explicit([QUESTION]) | {"chosen": 5}, "`chosen` is 5; expected chat messages", id="a number"),
        pytest.param(explicit([QUESTION]) | {"chosen": []}, "`chosen` is []; expected", id="no messages"),
        pytest.param(explicit([QUESTION]) | {"chosen": ""}, "`chosen` is an empty response", id="empty string"),
        pytest.param(
            explicit([QUESTION]) | {"rejected": [REJECTED | {"content": " \n"}]},
            "`rejected` is an empty response",
            id="only white space",
        ),
        pytest.param(
            explicit([QUESTION]) | {"rejected": [REJECTED | {"content": None}]},
            "`rejected` has the message",
            id="content is null",
        ),
        pytest.param(
            explicit([QUESTION]) | {"chosen": [QUESTION]},
            "after the prompt, `chosen` has messages of user; expected one message of the assistant",
            id="the user answers",
        ),
        pytest.param(
            explicit([QUESTION]) | {"rejected": [*EARLIER_TURN, REJECTED]},
            "after the prompt, `rejected` has messages of user, assistant, assistant",
            id="one whole conversation",
        ),
        pytest.param(
            explicit([QUESTION | {"role": "human"}]), "`prompt` has a message with the role 'human'", id="unknown role"
        ),
        pytest.param(
            explicit([QUESTION, CHOSEN]), "the prompt ends with the assistant's message", id="the prompt answers itself"
        ),
        pytest.param(
            {"chosen": [QUESTION, *EARLIER_TURN[::-1], CHOSEN], "rejected": [QUESTION, CHOSEN, QUESTION, REJECTED]},
            "after the prompt, `chosen` has messages of assistant, user, assistant",
            id="differ too early",
        ),
        pytest.param(
            {"chosen": [SYSTEM, QUESTION, CHOSEN], "rejected": [QUESTION, REJECTED]},
            "found no `prompt`, and `chosen` and `rejected` share no messages",
            id="differ from the start",
        ),
        pytest.param({"chosen": "Hello", "rejected": "Hi"}, "found no `prompt`", id="strings without a prompt"),
        pytest.param(explicit([]), "found no `prompt`", id="empty prompt"),
        pytest.param(
            {"chosen": SHAREGPT, "rejected": SHAREGPT},
            "expected an object with `role` and `content`, both strings",
            id="sharegpt",
        ),
        pytest.param(
            explicit([QUESTION, CALL, {"role": "tool", "content": "[]"}]),
            "`prompt` has a message with tool calls, which are not supported",
            id="tool calls",
        ),
        pytest.param(
            implicit([QUESTION]) | {"prompt": "Why?"},
            "`prompt` is not what `chosen` and `rejected` begin with",
            id="another prompt string",
        ),
        pytest.param(
            implicit([QUESTION]) | {"prompt": [SYSTEM, QUESTION]},
            "`prompt` is not what `chosen` and `rejected` begin with",
            id="other prompt messages",
        ),
        pytest.param(
            explicit([QUESTION | {"content": "The tower \ud83d"}]),
            "half of a surrogate pair",
            id="half a character",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_refused_with_its_place(row: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text(f"{GOOD_LINE}\n{json.dumps(row)}\n")
    with pytest.raises(DataError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"{path} line 2: ")
    assert problem in message
    assert "\n" not in message


def test_a_hub_dataset_that_cannot_be_reached_is_refused_by_name(tmp_path: Path) -> None:
    name = "nobody/no-such-dataset"
    program = f"from adpa.data.preferences import read_rows\nnext(read_rows({name!r}))"
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(source)}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line.startswith(
        f"adpa.errors.DataError: {name}: no such file or directory, and the Hub does not give it"
    )

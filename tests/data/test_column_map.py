"""``--map`` gives columns of the data the names that a pair has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.messages import QUESTION, Row
from tests.data.row_files import save_dataset, write_json, write_jsonl, write_parquet

from adpa.data.column_map import describe_map, parse_map
from adpa.data.rows import read_rows
from adpa.errors import DataError, OptionError, RowError

EXAMPLE = "write it as prompt=question,chosen=answer_a"
COLUMNS = "expected one of prompt, chosen, rejected, system, tools, chat_template_kwargs before ="
NONE, AMONG = "found no column", "among the columns question, chosen, rejected"
TABLES = [write_parquet, save_dataset]
Write = Callable[[list[Row], Path], Path]


def write_csv(rows: list[Row], path: Path) -> Path:
    path = path.with_suffix(".csv")
    path.write_text("".join(",".join(cells) + "\n" for cells in (rows[0], *(row.values() for row in rows))))
    return path


def test_a_map_is_a_list_of_columns_and_their_names() -> None:
    assert parse_map(None) == {}
    assert parse_map("prompt=question") == {"prompt": "question"}
    assert parse_map(" chosen = The answer ,prompt=q") == {"chosen": "The answer", "prompt": "q"}
    assert describe_map({"prompt": "q", "chosen": "a"}) == "chosen=a,prompt=q"
    assert describe_map({}) is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt", f"found 'prompt'; expected column=name; {EXAMPLE}"),
        ("prompt=", f"found 'prompt='; expected column=name; {EXAMPLE}"),
        ("=question", f"found '=question'; expected column=name; {EXAMPLE}"),
        ("prompt=a=b", f"found 'prompt=a=b'; expected column=name; {EXAMPLE}"),
        ("prompt=a,,chosen=b", f"found an empty entry; expected column=name; {EXAMPLE}"),
        ("promt=a", f"found 'promt'; {COLUMNS}; did you mean prompt?"),
        ("label=a", f"found 'label'; {COLUMNS}"),
        ("question=prompt", f"found 'question'; {COLUMNS}; write prompt=question"),
        ("prompt=a,prompt=b", "found 'prompt' twice; leave one of them out"),
        ("chosen=a,rejected=a", "found the name 'a' twice; map each column of the data once"),
    ],
)
def test_a_map_that_cannot_be_meant_is_refused(text: str, line: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_map(text)
    assert str(caught.value) == f"--map {text}: {line}"


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_csv, *TABLES])
def test_the_columns_of_every_kind_of_file_are_renamed(write: Write, tmp_path: Path) -> None:
    path = write([{"question": "Hi", "answer_a": "Hello", "bad": "No", "sys": "Be brief."}], tmp_path / "prefs")
    columns = parse_map("prompt=question,chosen=answer_a,rejected=bad,system=sys")
    ((_, row),) = read_rows(path, columns=columns)
    assert row == {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "system": "Be brief."}


@pytest.mark.parametrize("write", [write_jsonl, *TABLES])
def test_messages_and_tools_are_renamed(write: Write, tmp_path: Path) -> None:
    rows = [{"turns": [QUESTION], "chosen": "Yes", "rejected": "No", "functions": [{"name": "f"}]}]
    ((_, row),) = read_rows(write(rows, tmp_path / "prefs"), columns=parse_map("prompt=turns,tools=functions"))
    assert row == {"prompt": [QUESTION], "chosen": "Yes", "rejected": "No", "tools": [{"name": "f"}]}


@pytest.mark.parametrize("write", [write_jsonl, write_csv, *TABLES])
def test_columns_can_change_places(write: Write, tmp_path: Path) -> None:
    path = write([{"prompt": "Hi", "chosen": "No", "rejected": "Hello"}], tmp_path / "prefs")
    ((_, row),) = read_rows(path, columns=parse_map("chosen=rejected,rejected=chosen"))
    assert row == {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("prompt=qestion", f"{NONE} `qestion` for --map prompt=qestion {AMONG}; did you mean question?"),
        ("prompt=zebra", f"{NONE} `zebra` for --map prompt=zebra {AMONG}; check --map"),
        (
            "chosen=question",
            "--map chosen=question: there is a column `chosen` already; "
            "leave chosen=question out, or rename the column `chosen` in the data",
        ),
    ],
)
def test_a_map_that_does_not_fit_the_data_is_refused(text: str, line: str, tmp_path: Path) -> None:
    rows = [{"question": "Hi", "chosen": "Hello", "rejected": "No"}]
    for write in (write_csv, *TABLES):
        path = write(rows, tmp_path / write.__name__)
        with pytest.raises(DataError) as caught:
            list(read_rows(path, columns=parse_map(text)))
        assert str(caught.value) == f"{path}: {line}"
    path = write_jsonl(2 * rows, tmp_path / "prefs")
    read = list(read_rows(path, columns=parse_map(text)))
    assert [str(row) for _, row in read] == [f"{path} line {number}: {line}" for number in (1, 3)]


def test_a_row_that_lacks_a_column_of_the_map_is_invalid_alone(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text('{"chosen": "a", "rejected": "b"}\n[1]\n{"question": "Hi", "chosen": "Hello", "rejected": "No"}\n')
    rows: list[Any] = [row for _, row in read_rows(path, columns={"prompt": "question"})]
    lacking, listed, row = rows
    assert isinstance(lacking, RowError)
    assert lacking.reason == "columns of --map"
    assert listed == [1]
    assert row == {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}

"""CSV and TSV files: every cell is text as it is written."""

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.row_files import only_rows, refusal

from adpa.data.preferences import parse_pair
from adpa.data.rows import read_rows
from adpa.errors import RowError

HEADER = "prompt,chosen,rejected\n"
ROW = {"prompt": "Hi", "chosen": "Hello, you", "rejected": "No"}
QUOTED = "put cells with separators or line breaks into quotes, or pass --drop-invalid"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prefs.csv", f'{HEADER}Hi,"Hello, you",No\n'),
        ("prefs.CSV", f'\ufeff{HEADER}Hi,"Hello, you",No'),
        ("prefs.csv", '"prompt";"chosen";"rejected"\r\n"Hi";"Hello, you";"No"\r\n'),
        ("prefs.csv", 'prompt, chosen, rejected\nHi, "Hello, you", No\n'),
        ("prefs.csv", "prompt|chosen|rejected\nHi|Hello, you|No\n"),
        ("prefs.csv", 'prompt,chosen,rejected\rHi,"Hello, you",No\r'),
        ("prefs.csv", f'\n \n{HEADER}\n,,\nHi,"Hello, you",No\n\n'),
        ("prefs.csv", ',prompt,chosen,rejected,margin\n0,Hi,"Hello, you",No,0.5\n'),
        ("prefs.tsv", "prompt\tchosen\trejected\nHi\tHello, you\tNo\n"),
        ("prefs.csv", "\ufeffsep=;\r\nprompt;chosen;rejected\r\nHi;Hello, you;No\r\n"),
        ("prefs.csv", '"sep=|"\n\nprompt|chosen|rejected\nHi|Hello, you|No\n'),
        ("prefs.tsv", "sep=;\nprompt;chosen;rejected\nHi;Hello, you;No\n"),
    ],
)
def test_a_table_is_read_in_whatever_way_it_is_written(name: str, text: str, tmp_path: Path) -> None:
    assert only_rows(write(tmp_path / name, text)) == [ROW]


@pytest.mark.parametrize("cell", ["1", "007", "1e5", "NA", "nan", "null", "None", "true", "2026-11-28", " x ", "[1]"])
def test_no_cell_is_taken_for_a_number_or_a_null(cell: str, tmp_path: Path) -> None:
    path = write(tmp_path / "prefs.csv", f"{HEADER}{cell},{cell},{cell}\n")
    assert only_rows(path) == [{"prompt": cell, "chosen": cell, "rejected": cell}]


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))] * 3)))
def test_any_text_comes_back(cells: list[tuple[str, str, str]]) -> None:
    rows = [one for one in cells if any(cell.strip() for cell in one)]
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("prompt", "chosen", "rejected"), ("a", "b", "c"), *rows])
    with TemporaryDirectory() as folder:
        read = only_rows(write(Path(folder) / "prefs.csv", text.getvalue()))
    assert [tuple(row.values()) for row in read] == [("a", "b", "c"), *rows]


def test_a_cell_may_be_long_and_have_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "prefs.csv", f'{HEADER}a,"one\n\ntwo\r\nthree",{"x" * 300_000}\nb,"He said ""no""",c\n')
    one, two = only_rows(path)
    assert [where for where, _ in read_rows(path)] == [f"{path} line 2", f"{path} line 6"]
    assert (one["chosen"], len(one["rejected"]), two["chosen"]) == ("one\n\ntwo\r\nthree", 300_000, 'He said "no"')


@pytest.mark.parametrize(
    "cell", ['"[{""role"": ""user"", ""content"": ""Hi""}]"', "\"[{'role': 'user', 'content': 'Hi'}]\""]
)
def test_messages_in_a_cell_are_messages(cell: str, tmp_path: Path) -> None:
    """JSON writes them so, and pandas."""
    path = write(tmp_path / "prefs.csv", f"{HEADER}{cell},Yes,No\n")
    ((where, row),) = read_rows(path)
    assert parse_pair(where, row).prompt == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a,b", f"found 2 cells; the first line names 3 columns; {QUOTED}"),
        ("a", f"found 1 cell; the first line names 3 columns; {QUOTED}"),
        ("a,b,c,d", f"found 4 cells; the first line names 3 columns; {QUOTED}"),
        ('a,"b"c,d', "a cell goes on after its closing quote; double the quotes inside a cell, or pass --drop-invalid"),
        (
            "a,\udce9,c",
            "expected UTF-8 text; found the byte 0xe9; save the file as UTF-8, or pass --drop-invalid",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_invalid_alone(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prefs.csv"
    path.write_bytes(f"{HEADER}{line}\nx,y,z\n".encode(errors="surrogateescape"))
    (where, error), (_, row) = read_rows(path)
    assert isinstance(error, RowError)
    assert str(error) == f"{where}: {problem}"
    assert where == f"{path} line 2"
    assert row == {"prompt": "x", "chosen": "y", "rejected": "z"}


@pytest.mark.parametrize(
    ("cells", "problem"),
    [
        ("Hi,,No", "`chosen` is an empty response"),
        ("Hi,Yes,", "`rejected` is an empty response"),
        (",Yes,No", "`prompt` is ''"),
    ],
)
def test_an_empty_cell_is_no_response_and_no_prompt(cells: str, problem: str, tmp_path: Path) -> None:
    ((where, row),) = read_rows(write(tmp_path / "prefs.csv", f"{HEADER}{cells}\n"))
    with pytest.raises(RowError) as caught:
        parse_pair(where, row)
    assert str(caught.value).startswith(f"{where}: {problem}")


def test_an_empty_cell_of_another_column_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "prefs.csv", 'prompt,chosen,rejected,system,tools\nHi,Yes,No,,"[{""name"": ""f""}]"\n')
    ((where, row),) = read_rows(path)
    pair = parse_pair(where, row)
    assert (pair.prompt, pair.tools) == (({"role": "user", "content": "Hi"},), ({"name": "f"},))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEADER, ": found no rows; expected at least one preference pair; check --data"),
        ("\n \n", ": found no rows: all its lines are blank; check --data"),
        ("sep=;\n", ": found no rows: all its lines are blank; check --data"),
        (f'{HEADER}a,b,c\nd,"e,f\ng,h,i\n', " line 3: a cell begins with a quote and never ends; close the quote"),
        (
            '"prompt"x,chosen,rejected\n',
            " line 1: a cell goes on after its closing quote; double the quotes inside a cell",
        ),
        ("prompt,chosen,chosen,rejected\n", ": found the column `chosen` more than once; remove one of them"),
        (
            "question,accepted,rejected\n",
            ": found the columns question, accepted, rejected; expected `chosen`; "
            "pass --map prompt=question,chosen=accepted",
        ),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "prefs.csv", text)
    assert refusal(path) == f"{path}{problem}"


def test_the_same_pairs_have_the_same_ids_as_in_json(tmp_path: Path) -> None:
    def ids(path: Path) -> list[Any]:
        return [parse_pair(where, row).example_id for where, row in read_rows(path)]

    table = write(tmp_path / "prefs.csv", f'{HEADER}Hi,"Hello, you",No\n')
    lines = write(tmp_path / "prefs.jsonl", '{"prompt": "Hi", "chosen": "Hello, you", "rejected": "No"}\n')
    assert ids(table) == ids(lines)

import json
import re
from pathlib import Path

import pytest
from tests.data.messages import QUESTION
from tests.data.row_files import GOOD_LINE, ROWS, explicit, only_rows, refusal, write_jsonl

from adpa.data.rows import read_rows
from adpa.errors import DataError, RowError

BROKEN_LINES = [
    pytest.param('{"prompt": ', "it ends too early, at column 11", id="cut"),
    pytest.param(GOOD_LINE[:40], "it ends too early, at column 40", id="cut before a value"),
    pytest.param(GOOD_LINE[:50], "it ends inside the string that begins at column 41", id="cut in a string"),
    pytest.param(GOOD_LINE + GOOD_LINE, "Extra data at column", id="two rows in a line"),
    pytest.param('{"prompt": "a\tb"}', "Invalid control character at column 14", id="a bare tab"),
    pytest.param('{"seed": ' + "9" * 5000 + "}", "an integer with too many digits", id="5,000 digits"),
    pytest.param("[" * 200_000 + "]" * 200_000, "nested too deeply", id="200,000 lists"),
    pytest.param('{"a":' * 200_000 + "1" + "}" * 200_000, "nested too deeply", id="200,000 objects"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN_LINES)
def test_a_broken_line_is_an_error_in_its_place_and_the_others_are_read(
    line: str, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{line}\n{GOOD_LINE}\n")
    first, (where, error), last = read_rows(str(path))
    assert (first, last) == ((f"{path} line 1", ROWS[0]), (f"{path} line 4", ROWS[0]))
    assert isinstance(error, RowError)
    assert (where, error.reason) == (f"{path} line 3", "broken JSON")
    assert str(error).startswith(f"{path} line 3: broken JSON: ")
    assert problem in str(error)


@pytest.mark.parametrize("text", ["Où?", "\xf9", "Hi \xf9\xe9"])
def test_a_line_that_is_not_utf8_is_an_error_in_its_place_and_the_others_are_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(f"{GOOD_LINE}\n{json.dumps({'prompt': text}, ensure_ascii=False)}\n{GOOD_LINE}".encode("latin-1"))
    first, (where, error), last = read_rows(str(path))
    assert (first, last) == ((f"{path} line 1", ROWS[0]), (f"{path} line 3", ROWS[0]))
    assert isinstance(error, RowError)
    assert (where, error.reason) == (f"{path} line 2", "not UTF-8")
    assert str(error).startswith(f"{path} line 2: expected UTF-8 text; found the byte 0xf9; save the file as UTF-8")


def test_half_a_surrogate_pair_does_not_end_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text('{"prompt": "The tower \\ud83d"}\n' + GOOD_LINE)
    assert only_rows(path) == [{"prompt": "The tower \ud83d"}, ROWS[0]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        pytest.param(f"[{GOOD_LINE},\n{GOOD_LINE},\nnull null]", " line 3: broken JSON: ", id="no comma"),
        pytest.param(f"[{GOOD_LINE},\n{GOOD_LINE}", " line 2: broken JSON: ", id="cut"),
        pytest.param(
            f"[{GOOD_LINE}, {'9' * 5000}]", " row 2: broken JSON: an integer with too many digits", id="digits"
        ),
        pytest.param("[" * 200_000, " row 1: broken JSON: nested too deeply", id="nesting"),
        pytest.param(
            f"[{GOOD_LINE}\n,\n{GOOD_LINE},{'[' * 200_000}",
            " row 3: broken JSON: nested too deeply",
            id="nesting in it",
        ),
    ],
)
def test_a_broken_json_list_is_refused_as_a_whole(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "prefs.json"
    path.write_text(text)
    assert refusal(path).startswith(f"{path}{problem}")


def test_json_keeps_explicit_nulls(tmp_path: Path) -> None:
    row = explicit([QUESTION]) | {"tools": [{"name": "search", "parameters": None}]}
    assert only_rows(write_jsonl([row], tmp_path / "prefs")) == [row]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "c", "rejected": "d"}',
        '{"prompt": "a", "prompt": "a", "chosen": "c", "rejected": "d"}',
    ],
)
def test_a_key_that_is_there_twice_is_the_rows_own_fault(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "x", "chosen": "y", "rejected": "z"}}\n{line}\n')
    (_, good), (where, broken) = read_rows(str(path))
    assert good == {"prompt": "x", "chosen": "y", "rejected": "z"}
    assert isinstance(broken, RowError)
    assert re.search(f"{where}: the key '(chosen|content|prompt)' is there twice", str(broken))
    whole = tmp_path / "rows.json"
    whole.write_text(f'[{{"prompt": "x", "chosen": "y", "rejected": "z"}}, {line}]')
    with pytest.raises(DataError, match=f"{whole} row 2: the key .* is there twice"):
        list(read_rows(str(whole)))


ROW = '{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}'
EXPECTED = "expected a JSON list of objects, or one object a line; found one object with the keys "
IN_ROWS = "write the rows one after another (pandas: to_json(…, orient='records', lines=True))"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("prefs.jsonl", "\n \n\t\n", "found no rows: all its lines are blank; check --data"),
        ("prefs.json", " \n", "found no rows: all its lines are blank; check --data"),
        ("prefs.json", " [ ]", "found no rows: the list is empty; check --data"),
        (
            "prefs.jsonl",
            f"[{ROW}, {ROW}]",
            "expected one JSON object a line; found a JSON list; give it the suffix .json",
        ),
        ("prefs.txt", f"[\n{ROW}\n]", "expected one JSON object a line; found a JSON list; give it the suffix .json"),
        (
            "prefs.json",
            f'{{"train": [{ROW}], "version": 1}}',
            f"{EXPECTED}train, version; write the list under train to a file of its own",
        ),
        (
            "prefs.jsonl",
            f'{{\n "data": [\n{ROW}\n]}}',
            f"{EXPECTED}data; write the list under data to a file of its own",
        ),
        (
            "prefs.json",
            ROW.replace("{", "{\n"),
            f"{EXPECTED}prompt, chosen, rejected; put [ and ] around it, or write it on one line",
        ),
        ("prefs.json", '{"chosen": ["a", "b"], "rejected": ["c", "d"]}', f"{EXPECTED}chosen, rejected; {IN_ROWS}"),
        ("prefs.json", '{"chosen": {"0": "a"}, "rejected": {"0": "c"}}', f"{EXPECTED}chosen, rejected; {IN_ROWS}"),
        ("prefs.jsonl", '{\n"chosen":{"0":"a"},\n"rejected":{"0":"c"}}', f"{EXPECTED}chosen, rejected; {IN_ROWS}"),
    ],
)
def test_json_of_another_form_is_refused_by_its_form(name: str, text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert refusal(path) == f"{path}: {problem}"


@pytest.mark.parametrize("text", [ROW, f"\ufeff{ROW}\n", f"[1, 2]\n{ROW}\n", f'{ROW}\n{{"rows": [{ROW}]}}\n'])
def test_lines_are_read_as_lines(text: str, tmp_path: Path) -> None:
    """A line that is no pair is the row's own fault."""
    path = tmp_path / "prefs.jsonl"
    path.write_text(text)
    assert json.loads(ROW) in only_rows(path)


@pytest.mark.parametrize("cut", [*range(1, len(ROW)), -1])
def test_a_line_that_is_cut_off_says_so_once(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text(f"{ROW}\n{ROW[:cut]}")
    _, (where, error) = read_rows(str(path))
    assert isinstance(error, RowError)
    message = str(error)
    assert re.fullmatch(
        f"{where}: broken JSON: it ends (too early, at|inside the string that begins at) column \\d+; "
        "mend the row, or pass --drop-invalid",
        message,
    ) or message.startswith(f"{where}: broken JSON: Expecting property name enclosed in double quotes at column ")
    assert message.count(" at ") == 1
    assert message.count(str(path)) == 1


def test_a_long_key_is_cut_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    key = "k" * 5000
    path.write_text(f'{{"{key}": 1, "{key}": 2}}\n{ROW}\n')
    (_, error), _ = read_rows(str(path))
    shown = f"{'k' * 40}…"
    assert str(error) == f"{path} line 1: the key '{shown}' is there twice; mend the row, or pass --drop-invalid"

import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tests.data.json_files import edit_json
from tests.data.messages import CHOSEN, EARLIER_TURN, QUESTION, REJECTED, SYSTEM, Row

from adpa.data.rows import read_rows
from adpa.errors import DataError, RowError


def explicit(prompt: list[Row]) -> Row:
    return {"prompt": prompt, "chosen": [CHOSEN], "rejected": [REJECTED]}


ROWS = [explicit([QUESTION]), explicit([SYSTEM, QUESTION]), explicit([*EARLIER_TURN, QUESTION])]
GOOD_LINE = json.dumps(ROWS[0])


def only_rows(path: Path) -> list[Any]:
    return [row for _, row in read_rows(str(path))]


def refusal(path: Path) -> str:
    """The one line with which the file is refused."""
    with pytest.raises(DataError) as caught:
        only_rows(path)
    assert not isinstance(caught.value, RowError)
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert "\n" not in message
    return message


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
def test_every_kind_of_file_gives_the_same_rows(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    assert only_rows(write(ROWS, tmp_path / "prefs")) == ROWS


def test_a_pair_knows_the_line_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_text("\n" + GOOD_LINE + "\n\n\n" + GOOD_LINE)
    assert [where for where, _ in read_rows(str(path))] == [f"{path} line 2", f"{path} line 5"]


@pytest.mark.parametrize("write", [write_json, write_parquet, save_dataset])
def test_a_pair_knows_the_row_it_was_read_from(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    path = write([explicit([QUESTION]), explicit([SYSTEM, QUESTION])], tmp_path / "prefs")
    assert [where for where, _ in read_rows(str(path))] == [f"{path} row 1", f"{path} row 2"]


def save_two_splits(folder: Path) -> Path:
    splits = {"train_prefs": explicit([QUESTION]), "test_prefs": explicit([SYSTEM, QUESTION])}
    DatasetDict({name: Dataset.from_list([row]) for name, row in splits.items()}).save_to_disk(folder)
    return folder


def test_the_split_that_is_named_is_read(tmp_path: Path) -> None:
    ((_, row),) = read_rows(str(save_two_splits(tmp_path / "prefs")), "test_prefs")
    assert row == explicit([SYSTEM, QUESTION])


def test_a_split_of_data_that_has_none_is_refused(tmp_path: Path) -> None:
    file = write_jsonl([explicit([QUESTION])], tmp_path / "prefs")
    Dataset.from_list([explicit([QUESTION])]).save_to_disk(tmp_path / "saved")
    for source in (file, tmp_path / "saved"):
        with pytest.raises(DataError, match=r"found --split train; .* has no splits"):
            list(read_rows(str(source), "train"))


@pytest.mark.parametrize(("split", "choice"), [(None, "no --split"), ("test", "--split test")])
def test_a_split_that_is_missing_is_refused_with_the_names_there_are(
    split: str | None, choice: str, tmp_path: Path
) -> None:
    folder = save_two_splits(tmp_path / "prefs")
    with pytest.raises(DataError) as caught:
        list(read_rows(str(folder), split))
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
        ("prefs.json", '[\n"Où?"]'.encode("cp1252"), "expected UTF-8 text; found the byte 0xf9 in line 2"),
        ("prefs.jsonl", '{"prompt": "Où?"}'.encode("utf-16"), "expected UTF-8 text; found UTF-16"),
        ("prefs.jsonl", '{"prompt": "Où?"}'.encode("utf-32"), "expected UTF-8 text; found UTF-32"),
        ("prefs.json", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "expected UTF-8 text; found a binary file"),
        ("prefs.jsonl.gz", b"\x1f\x8b\x08\x00", "expected UTF-8 text; found a binary file"),
        ("prefs.parquet", b'{"prompt": "Hi"}', "expected a Parquet file"),
    ],
)
def test_a_file_that_holds_no_preferences_is_refused_by_name(
    name: str, content: bytes | None, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(path)))
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
        list(read_rows(str(folder)))
    assert str(caught.value).startswith(f"{folder}: expected a directory saved by datasets.save_to_disk")


BROKEN_LINES = [
    pytest.param('{"prompt": ', "Expecting value at column 11", id="cut"),
    pytest.param(GOOD_LINE[:40], "at column", id="cut in a string"),
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


def test_an_arrow_map_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    arguments = pa.array([[("city", "Oslo")], [], None], pa.map_(pa.string(), pa.string()))
    texts = ["a", "b", "c"]
    table = {"prompt": texts, "chosen": texts, "rejected": texts, "chat_template_kwargs": arguments}
    pq.write_table(pa.table(table), path)
    assert [row.get("chat_template_kwargs") for row in only_rows(path)] == [{"city": "Oslo"}, {}, None]


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


@pytest.mark.parametrize("name", ["numpy", "pandas", "arrow", "torch"])
@pytest.mark.parametrize("columns", [None, ["prompt"]])
def test_a_directory_in_another_format_gives_all_rows_as_plain_python(
    columns: list[str] | None, name: str, tmp_path: Path
) -> None:
    Dataset.from_list(ROWS).with_format(name, columns=columns).save_to_disk(tmp_path / "prefs")
    assert only_rows(tmp_path / "prefs") == ROWS


UNUSED = {
    "a duration": pa.array([datetime.timedelta(days=1)]),
    "a map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    "text that is not UTF-8": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers()),
    "a date that Python does not have": pa.array([2**62], pa.timestamp("ms")),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_an_unused_column_of_any_type_does_no_harm(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    texts = {"prompt": ["Hi"], "chosen": ["Hello"], "rejected": ["No"]}
    pq.write_table(pa.table({**texts, "unused": UNUSED[kind]}), path)
    assert only_rows(path) == [{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}]


def test_a_column_that_would_be_lost_is_read(tmp_path: Path) -> None:
    row = explicit([QUESTION]) | {"system": "Be brief.", "images": [[1, 2]], "documents": ["one"], "margin": 0.5}
    used = {name: value for name, value in row.items() if name != "margin"}
    assert only_rows(write_parquet([row], tmp_path / "prefs")) == [used]
    assert only_rows(save_dataset([row], tmp_path / "prefs")) == [used]


TOOL_ROWS = [
    explicit([QUESTION]) | {"tools": [{"name": name, "parameters": {"properties": {argument: {"type": "string"}}}}]}
    for name, argument in (("search", "query"), ("read", "path"))
]
CALL_ROWS = [
    explicit([QUESTION]) | {"chosen": [CHOSEN | {"tool_calls": [{"name": "search", "arguments": arguments}]}]}
    for arguments in ({"query": "x"}, {"limit": 3})
]
KWARGS_ROWS = [
    explicit([QUESTION]) | {"chat_template_kwargs": kwargs} for kwargs in ({"thinking": False}, {"date": "x"})
]


@pytest.mark.parametrize("rows", [TOOL_ROWS, CALL_ROWS, KWARGS_ROWS])
@pytest.mark.parametrize("write", [write_parquet, write_parquet_by_datasets, save_dataset])
def test_keys_that_arrow_adds_to_a_row_are_taken_away(
    write: Callable[[list[Row], Path], Path], rows: list[Row], tmp_path: Path
) -> None:
    assert only_rows(write(rows, tmp_path / "prefs")) == rows


def test_json_keeps_explicit_nulls(tmp_path: Path) -> None:
    row = explicit([QUESTION]) | {"tools": [{"name": "search", "parameters": None}]}
    assert only_rows(write_jsonl([row], tmp_path / "prefs")) == [row]


@pytest.mark.parametrize("file", ["directory", "Parquet"])
def test_values_that_datasets_stores_as_json_are_decoded(file: str, tmp_path: Path) -> None:
    calls = [{"name": "search", "arguments": {"query": None}}, {"name": "read", "arguments": {"lines": [1, "last"]}}]
    rows = [explicit([QUESTION]) | {"chosen": [CHOSEN | {"tool_calls": [call]}]} for call in calls]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    path = tmp_path / "prefs.parquet"
    dataset.save_to_disk(path) if file == "directory" else dataset.to_parquet(path)
    assert only_rows(path) == rows


@pytest.mark.parametrize("write", [write_parquet, save_dataset])
def test_a_table_without_responses_is_refused_with_its_columns(
    write: Callable[[list[Row], Path], Path], tmp_path: Path
) -> None:
    path = write([{"instruction": "Hi", "output": "Hello"}], tmp_path / "prefs")
    assert refusal(path).startswith(f"{path}: found the columns instruction, output; expected `chosen`")


def test_a_column_that_a_table_has_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["chosen", "chosen", "rejected"]), path)
    assert refusal(path).startswith(f"{path}: found the column `chosen` more than once")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_parquet_file_is_refused_by_name(part: float, tmp_path: Path) -> None:
    path = write_parquet(ROWS, tmp_path / "prefs")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert refusal(path).startswith(f"{path}: expected a Parquet file; ")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
def test_a_truncated_arrow_file_of_a_directory_is_refused_by_name(part: float, tmp_path: Path) -> None:
    folder = save_dataset(ROWS, tmp_path / "prefs")
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert f"found a broken file, {file} (" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_directory_with_a_broken_description_is_refused(text: str, tmp_path: Path) -> None:
    folder = save_dataset(ROWS, tmp_path / "prefs")
    (folder / "state.json").write_text(text)
    assert "found JSON of another form (" in refusal(folder)


def test_a_missing_file_of_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_dataset(ROWS, tmp_path / "prefs")
    (file,) = folder.glob("*.arrow")
    file.unlink()
    assert f"found a broken file, {file} (" in refusal(folder)


def test_a_directory_needs_no_package_but_arrow(tmp_path: Path) -> None:
    """Its format may come from a package that is missing here, and an unused column may have a type of the future."""
    folder = save_dataset(ROWS, tmp_path / "prefs")
    edit_json(folder / "state.json", lambda state: state.update(_format_type="polars"))
    edit_json(folder / "dataset_info.json", lambda info: info["features"].update(unused={"_type": "Hologram"}))
    assert only_rows(folder) == ROWS


def test_a_broken_split_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    folder = save_two_splits(tmp_path / "prefs")
    next((folder / "train_prefs").glob("*.arrow")).unlink()
    assert [row for _, row in read_rows(str(folder), "test_prefs")] == [explicit([SYSTEM, QUESTION])]


def test_a_file_that_is_damaged_in_the_middle_is_refused_after_the_rows_before(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    numbers = [str(number) for number in range(4000)]
    pq.write_table(pa.table({"prompt": numbers, "chosen": numbers, "rejected": numbers}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 1000] = b"\xff" * 1000
    path.write_bytes(content)
    rows = read_rows(str(path))
    assert [next(rows)[1] for _ in range(1000)][-1] == {"prompt": "999", "chosen": "999", "rejected": "999"}
    with pytest.raises(DataError, match=r"prefs\.parquet: cannot be read after row \d000: "):
        list(rows)


def test_text_of_a_table_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    text = UNUSED["text that is not UTF-8"]
    pq.write_table(pa.table({"prompt": ["Hi"], "chosen": text, "rejected": ["No"]}), path)
    assert refusal(path).startswith(f"{path}: cannot be read after row 0: 'utf-8' codec can't decode")


def test_a_hub_dataset_that_cannot_be_reached_is_refused_by_name(tmp_path: Path) -> None:
    name = "nobody/no-such-dataset"
    program = f"from adpa.data.rows import read_rows\nnext(read_rows({name!r}))"
    source = Path(__file__).parents[2] / "src"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(source)}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last_line = finished.stderr.strip().splitlines()[-1]
    assert last_line.startswith(
        f"adpa.errors.DataError: {name}: no such file or directory, and the Hub does not give it"
    )


def test_an_arrow_file_that_is_cut_between_two_batches_is_refused(tmp_path: Path) -> None:
    """pyarrow reads such a file as a shorter one."""
    (file,) = save_dataset(5000 * ROWS[:1], tmp_path / "saved").glob("*.arrow")
    content = file.read_bytes()
    with pa.memory_map(str(file)) as source:
        reader = pa.ipc.MessageReader.open_stream(source)
        ends = []
        while True:
            try:
                reader.read_next_message()
            except StopIteration:
                break
            ends.append(source.tell())
    assert len(ends) > 3
    for end in ends[1:]:
        file.write_bytes(content[:end])
        with pytest.raises(DataError, match=f"found a broken file, {file} .it is cut off."):
            list(read_rows(str(tmp_path / "saved")))


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

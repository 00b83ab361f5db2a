import datetime
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tests.data.json_files import edit_json
from tests.data.messages import CHOSEN, QUESTION, SYSTEM, Row
from tests.data.row_files import (
    ROWS,
    explicit,
    only_rows,
    refusal,
    save_dataset,
    save_two_splits,
    write_parquet,
    write_parquet_by_datasets,
)

from adpa.data.preferences import parse_pair
from adpa.data.rows import read_rows
from adpa.errors import DataError, RowError

SAVED = "expected a directory saved by datasets.save_to_disk; found "
FOLDER = "expected a folder of JSONL, JSON, CSV or Parquet files, or one saved by datasets.save_to_disk; found "
OTHER = "; give --data a file or such a folder"


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], f"{FOLDER}an empty one{OTHER}"),
        (["config.json", "model.safetensors"], "it is a model; expected preference pairs; check --data"),
        (["adapter_config.json"], "it is a model; expected preference pairs; check --data"),
        (["cache.json", "responses"], "it is a cache; expected preference pairs; check --data"),
        (["e", "d", "c", "b", "a"], f"{FOLDER}a, b, c, …{OTHER}"),
        (
            ["README.md", "b.parquet", "a.jsonl"],
            "found files of several formats: JSON, Parquet; give --data one of them, such as FOLDER/a.jsonl",
        ),
    ],
)
def test_a_directory_of_something_else_is_refused_by_what_it_has(
    names: list[str], problem: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert refusal(tmp_path) == f"{tmp_path}: {problem.replace('FOLDER', str(tmp_path))}"


def test_a_directory_without_rows_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([]).save_to_disk(tmp_path / "prefs")
    assert refusal(tmp_path / "prefs").startswith(f"{tmp_path}/prefs: found no rows; expected at least one")


def test_a_directory_with_broken_rows_is_refused_by_the_file(tmp_path: Path) -> None:
    folder = save_dataset([explicit([QUESTION])], tmp_path / "prefs")
    (file,) = folder.glob("*.arrow")
    file.write_bytes(b"damaged")
    assert refusal(folder).startswith(f"{folder}: {SAVED}a broken file, {file} (")


@pytest.mark.parametrize("write", [write_parquet, write_parquet_by_datasets, save_dataset])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_column_of_the_pair_keeps_its_null(
    column: str, write: Callable[[list[Row], Path], Path], tmp_path: Path
) -> None:
    texts = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    rows: list[Row] = [texts | {"system": "Be brief."}, texts | {column: None}]
    assert only_rows(write(rows, tmp_path / "prefs")) == rows


def test_an_arrow_map_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    arguments = pa.array([[("city", "Oslo")], [], None], pa.map_(pa.string(), pa.string()))
    texts = ["a", "b", "c"]
    table = {"prompt": texts, "chosen": texts, "rejected": texts, "chat_template_kwargs": arguments}
    pq.write_table(pa.table(table), path)
    assert [row.get("chat_template_kwargs") for row in only_rows(path)] == [{"city": "Oslo"}, {}, None]


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
    assert refusal(path) == (
        f"{path}: found the columns instruction, output; expected `chosen` and `rejected`; "
        "a row needs a prompt and two responses: name them with --map prompt=instruction,chosen=NAME,rejected=NAME; "
        "prompts alone are enough where only --student answers them"
    )


@pytest.mark.parametrize("write", [write_parquet, save_dataset])
def test_a_prompt_column_of_another_name_is_named(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    path = write([{"question": "Hi", "chosen": "Hello", "rejected": "No"}], tmp_path / "prefs")
    ((where, row),) = read_rows(str(path))
    with pytest.raises(RowError, match="; pass --map prompt=question, or make both"):
        parse_pair(where, row)


def test_a_column_that_a_table_has_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prefs.parquet"
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["chosen", "chosen", "rejected"]), path)
    assert refusal(path).startswith(f"{path}: found the column `chosen` more than once")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_parquet_file_is_refused_by_name(part: float, tmp_path: Path) -> None:
    path = write_parquet(ROWS, tmp_path / "prefs")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert refusal(path) == f"{path}: expected a Parquet file; found one that is cut off; copy it again"


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    path = write_parquet(ROWS, tmp_path / "prefs")
    content = bytearray(path.read_bytes())
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[footer : footer + 50] = b"\xff" * 50
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: expected a Parquet file; found a damaged one (")


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

"""A folder of files is read as the Hub would show it."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from adpa.data.rows import read_rows
from adpa.errors import DataError


def text_of(name: str) -> str:
    return f"{name.partition('.')[0]} says"


def write_jsonl(path: Path) -> None:
    path.write_text(json.dumps({"prompt": text_of(path.name), "chosen": "Yes", "rejected": "No"}) + "\n")


def write_gzip(path: Path) -> None:
    write_jsonl(path)
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def write_csv(path: Path) -> None:
    path.write_text(f"prompt,chosen,rejected\n{text_of(path.name)},Yes,No\n")


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"prompt": [text_of(path.name)], "chosen": ["Yes"], "rejected": ["No"]}), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_jsonl,
    ".gz": write_gzip,
    ".csv": write_csv,
    ".parquet": write_parquet,
}


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[path.suffix](path) if path.suffix in WRITERS else path.write_text("about\n")
    return folder


def prompts(folder: Path, split: str | None = None) -> list[str]:
    rows: list[Any] = [row for _, row in read_rows(folder, split)]
    return [row["prompt"] for row in rows]


SEVERAL = "found files of several formats:"
LAYOUTS = {
    "files": (["b.jsonl", "a.jsonl", "README.md", "LICENSE"], {"train": ["a says", "b says"]}),
    "one file": (["prefs.parquet"], {"train": ["prefs says"]}),
    "names": (
        ["train_1.csv", "train_0.csv", "test.csv", "valid.csv"],
        {"train": ["train_0 says", "train_1 says"], "validation": ["valid says"], "test": ["test says"]},
    ),
    "folders": (
        ["train/b.jsonl.gz", "train/a.jsonl.gz", "test/c.jsonl.gz"],
        {"train": ["a says", "b says"], "test": ["c says"]},
    ),
    "shards": (
        [
            "data/train_prefs-00001-of-00002.parquet",
            "data/train_prefs-00000-of-00002.parquet",
            "data/test_prefs-00000-of-00001.parquet",
        ],
        {
            "train_prefs": ["train_prefs-00000-of-00002 says", "train_prefs-00001-of-00002 says"],
            "test_prefs": ["test_prefs-00000-of-00001 says"],
        },
    ),
    "deep": (["data/en/x.json", "data/de/x.json", "data/de/a.json"], {"train": ["a says", "x says", "x says"]}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_has_the_splits_that_datasets_finds(layout: str, tmp_path: Path) -> None:
    names, splits = LAYOUTS[layout]
    folder = fill(tmp_path / "prefs", *names)
    for split, expected in splits.items():
        assert prompts(folder, split) == expected
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "copies"))
    assert {name: sorted(rows["prompt"]) for name, rows in loaded.items()} == splits
    if len(splits) == 1:
        assert prompts(folder) == splits["train"]


README = "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n{}---\n# Pairs\n"


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        ("  - split: chosen_ones\n    path: a.jsonl\n", {"chosen_ones": ["a says"]}),
        ("  - split: train\n    path: x/*.jsonl\n  - split: dev\n    path: a.jsonl\n", {"train": ["b says", "c says"]}),
        ("  - a.jsonl\n  - x/b.jsonl\n", {"train": ["a says", "b says"]}),
    ],
)
def test_the_readme_of_a_copied_repository_names_its_splits(
    files: str, splits: dict[str, list[str]], tmp_path: Path
) -> None:
    folder = fill(tmp_path / "prefs", "a.jsonl", "x/b.jsonl", "x/c.jsonl")
    (folder / "README.md").write_text(README.format(files))
    for split, expected in splits.items():
        assert prompts(folder, split) == expected
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "copies"))
    assert {name: loaded[name]["prompt"][:] for name in splits} == splits


@pytest.mark.parametrize("readme", ["# Pairs\n", "---\nlicense: mit\n---\n# Pairs\n", ""])
def test_a_readme_that_names_no_files_changes_nothing(readme: str, tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jsonl")
    (folder / "README.md").write_text(readme)
    assert prompts(folder) == ["a says"]


@pytest.mark.parametrize(
    ("readme", "line"),
    [
        ("---\na: [\n---\n", "{}/README.md: its metadata cannot be read; mend or remove the lines between ---"),
        (
            "---\nconfigs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: de\n  data_files: b.jsonl\n---\n",
            "{}: its README.md names several configurations: en, de; give --data the folder or the files of one",
        ),
    ],
)
def test_a_readme_that_does_not_say_which_files_is_refused(readme: str, line: str, tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jsonl", "b.jsonl")
    (folder / "README.md").write_text(readme)
    with pytest.raises(DataError) as caught:
        list(read_rows(folder))
    assert str(caught.value) == line.format(folder)


def test_a_row_knows_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "prefs", "data/a.jsonl", "data/b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert [where for where, _ in read_rows("prefs")] == ["prefs/data/a.jsonl line 1", "prefs/data/b.jsonl line 1"]


def test_slices_go_over_all_files_of_a_split(tmp_path: Path) -> None:
    folder = fill(tmp_path, *(f"{letter}.csv" for letter in "abcd"))
    assert prompts(folder, "train[25%:75%]") == ["b says", "c says"]
    assert prompts(folder, "train[:1]+train[-1:]") == ["a says", "d says"]


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (
            ["a.jsonl", "b.csv"],
            "found files of several formats: CSV, JSON; give --data one of them, such as {}/a.jsonl",
        ),
        (
            ["train.parquet", "test.jsonl"],
            f"{SEVERAL} JSON, Parquet; give --data one of them, such as {{}}/test.jsonl",
        ),
        (["train.csv", "test.csv"], "found no --split; expected one of train, test; name it with --split"),
        (
            ["notes.txt", "README.md"],
            "expected a folder of JSONL, JSON, CSV or Parquet files, or one saved by datasets.save_to_disk; found "
            "README.md, notes.txt; give --data a file or such a folder",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(names: list[str], line: str, tmp_path: Path) -> None:
    folder = fill(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        list(read_rows(folder))
    assert str(caught.value) == f"{folder}: {line.format(folder)}"


def test_a_wrong_file_of_a_folder_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path))
    assert str(caught.value) == f"{tmp_path}/b.jsonl: found no rows: the file is empty; check --data"

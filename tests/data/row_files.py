"""Writes rows to every kind of file, and reads them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
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


def save_two_splits(folder: Path) -> Path:
    splits = {"train_prefs": explicit([QUESTION]), "test_prefs": explicit([SYSTEM, QUESTION])}
    DatasetDict({name: Dataset.from_list([row]) for name, row in splits.items()}).save_to_disk(folder)
    return folder

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from tests.data.messages import QUESTION, SYSTEM, Row
from tests.data.row_files import (
    GOOD_LINE,
    ROWS,
    WRITERS,
    explicit,
    only_rows,
    save_dataset,
    save_two_splits,
    write_json,
    write_jsonl,
    write_parquet,
)

from adpa.data.rows import read_rows
from adpa.errors import DataError


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


def test_the_split_that_is_named_is_read(tmp_path: Path) -> None:
    ((_, row),) = read_rows(str(save_two_splits(tmp_path / "prefs")), "test_prefs")
    assert row == explicit([SYSTEM, QUESTION])


def test_data_without_splits_is_called_train(tmp_path: Path) -> None:
    file = write_jsonl([explicit([QUESTION])], tmp_path / "prefs")
    Dataset.from_list([explicit([QUESTION])]).save_to_disk(tmp_path / "saved")
    for source in (file, tmp_path / "saved"):
        assert len(list(read_rows(source, "train"))) == 1
        with pytest.raises(DataError) as caught:
            list(read_rows(source, "test"))
        assert str(caught.value) == f"{source}: found --split test; its only split is train; leave --split out"


@pytest.mark.parametrize(
    ("split", "choice", "fix"),
    [
        (None, "no --split", "name it with --split"),
        ("validation", "--split validation", "name it with --split"),
        ("train", "--split train", "did you mean train_prefs?"),
        ("test-prefs", "--split test-prefs", "did you mean test_prefs?"),
    ],
)
def test_a_split_that_is_missing_is_refused_with_the_names_there_are(
    split: str | None, choice: str, fix: str, tmp_path: Path
) -> None:
    folder = save_two_splits(tmp_path / "prefs")
    with pytest.raises(DataError) as caught:
        list(read_rows(str(folder), split))
    assert str(caught.value) == f"{folder}: found {choice}; expected one of train_prefs, test_prefs; {fix}"

"""Splits and slices are those of ``datasets``, on files, folders and saved data alike."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, ReadInstruction
from tests.data.messages import Row
from tests.data.row_files import save_dataset, write_json, write_jsonl, write_parquet

from adpa.data.rows import read_rows
from adpa.data.splits import check_split
from adpa.errors import DataError, OptionError

FORM = "write it as in train[:1000], train[10%:20%] or train+test"


def row(number: int, split: str = "train") -> Row:
    return {"prompt": f"{split} {number}", "chosen": "Yes", "rejected": "No"}


ROWS = [row(number) for number in range(1, 21)]
DATASETS = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list([row(n, "test") for n in range(1, 6)]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("splits") / "saved"
    DATASETS.save_to_disk(folder)
    return folder


def prompts(source: Path, split: str | None, limit: int | None = None) -> list[str]:
    rows: list[Any] = [row for _, row in read_rows(source, split, limit)]
    return [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    "split",
    [
        *("train", "test", "train+test", "test + train", "train[:3]", "train[17:]", "train[5:8]", "train[-2:]"),
        *("train[:-15]", "train[10%:20%]", "test[50%:]", "train[:7%]", "train[-10%:]", "train[:99]", "train[:1_0]"),
        *("train[:2]+train[4:6]+test[:1]", "train[:100%]", "train[2:4]+train[1:3]"),
    ],
)
def test_a_slice_has_the_rows_that_datasets_gives_it(split: str, saved: Path) -> None:
    expected = itertools.chain.from_iterable(
        DATASETS[one.splitname]["prompt"][one.from_ : one.to]
        for one in ReadInstruction.from_spec(split).to_absolute({"train": 20, "test": 5})
    )
    assert prompts(saved, split) == list(expected)


@pytest.mark.parametrize("write", [write_jsonl, write_json, write_parquet, save_dataset])
def test_data_without_splits_has_slices_of_train(write: Callable[[list[Row], Path], Path], tmp_path: Path) -> None:
    path = write(ROWS, tmp_path / "prefs")
    assert prompts(path, "train[:2]") == ["train 1", "train 2"]
    assert prompts(path, "train[10%:20%]") == ["train 3", "train 4"]
    assert prompts(path, "train[-1:]+train[:1]") == ["train 20", "train 1"]


def test_data_that_was_saved_as_a_split_keeps_its_name(tmp_path: Path) -> None:
    DATASETS.save_to_disk(tmp_path / "all")
    (tmp_path / "all" / "test").rename(tmp_path / "test")
    state = tmp_path / "test" / "state.json"
    state.write_text(state.read_text().replace('"_split": null', '"_split": "test"'))
    assert prompts(tmp_path / "test", "test[:1]") == ["test 1"]


def test_a_row_keeps_the_number_that_it_has_in_its_split(saved: Path, tmp_path: Path) -> None:
    places = [where for where, _ in read_rows(saved, "train[3:4]+test[1:2]")]
    assert places == [f"{saved} split train row 4", f"{saved} split test row 2"]
    file = write_jsonl(ROWS, tmp_path / "prefs")
    assert [where for where, _ in read_rows(file, "train[-1:]")] == [f"{file} line 39"]


def test_a_limit_comes_after_the_slice(saved: Path) -> None:
    assert prompts(saved, "train[5:8]+test", limit=4) == ["train 6", "train 7", "train 8", "test 1"]
    assert prompts(saved, "test", limit=99) == [f"test {number}" for number in range(1, 6)]


@pytest.mark.parametrize(("split", "limit"), [(None, 5), ("train[:5]", None), ("train[2:7]", None)])
def test_a_few_rows_of_a_long_file_are_read_alone(
    split: str | None, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(100 * ROWS, tmp_path / "prefs")
    read: list[str] = []
    loads = json.loads

    def count(text: str, **options: Any) -> Any:
        read.append(text)
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", count)
    assert len(prompts(path, split, limit)) == 5
    assert len(read) < 10


@pytest.mark.parametrize(
    ("split", "problem"),
    [
        ("train[5]", "no slice of a split"),
        ("train[:1e3]", "no slice of a split"),
        ("train[0:9:2]", "no slice of a split"),
        ("[:10]", "no slice of a split"),
        ("train+", "no slice of a split"),
        ("train[:10](closest)", "no slice of a split"),
        ("train[:150%]", "found more than 100 percent"),
    ],
)
def test_what_datasets_does_not_read_is_refused_before_the_data(split: str, problem: str, saved: Path) -> None:
    for read in (lambda: check_split(split), lambda: list(read_rows(saved, split))):
        with pytest.raises(OptionError) as caught:
            read()
        assert str(caught.value) == f"--split {split}: {problem}; {FORM}"


def test_whole_percents_need_a_hundred_rows(saved: Path) -> None:
    with pytest.raises(OptionError, match="pct1_dropremainder needs a split of at least 100 rows"):
        list(read_rows(saved, "train[:10%](pct1_dropremainder)"))


@pytest.mark.parametrize(
    ("split", "line"),
    [
        ("tets[:10]", "found --split tets[:10]; expected one of train, test; did you mean test?"),
        ("train+dev", "found --split train+dev; expected one of train, test; name it with --split"),
        ("train[3:3]", "found no rows in split train[3:3]; expected at least one preference pair; check --split"),
    ],
)
def test_a_slice_of_nothing_is_refused(split: str, line: str, saved: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(saved, split))
    assert str(caught.value) == f"{saved}: {line}"

"""Exported rows have the numbers of the cache in plain columns; an output is whole or does not exist."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_from_disk
from tests.data.makers import INFO, SCORING, response_rows, signal_rows
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, export_cache
from adpa.data.cache import plain_rows
from adpa.data.cache.responses import make_response_set, read_response_sets
from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import plain_schema, plain_table
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals
from adpa.errors import AdpaError, CacheError, OptionError


def expected(cache: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a set as the readers of training see them."""
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    responses = next(one for one in read_response_sets(cache) if one.info.name == name)
    rows = [signals.row(int(number)) for number in signals.locate(responses.table["key"])]
    return [
        {
            "example_id": example_id,
            "prompt_ids": sequence.prompt_ids.tolist(),
            "response_ids": sequence.response_ids.tolist(),
        }
        | {
            column: None if value is None else value.astype(np.float32 if value.dtype.kind == "f" else int).tolist()
            for column, value in vars(row).items()
            if column != "key"
        }
        for example_id, sequence, row in zip(
            responses.table["example_id"].to_pylist(), responses.sequences(), rows, strict=True
        )
    ]


@pytest.mark.parametrize("tokens_at_once", [1, 20, 1 << 15])
def test_parquet_has_every_row_in_the_sets_order(
    filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    monkeypatch.setattr(plain_rows, "TOKENS_AT_ONCE", tokens_at_once)
    report = export_cache(filled.cache, tmp_path / "rows.parquet", response_set="chosen")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.to_pylist() == expected(filled.cache, "chosen")
    assert table.schema.equals(plain_rows.SCHEMA)
    assert (report.rows, report.bytes) == (8, (tmp_path / "rows.parquet").stat().st_size)
    assert report.tokens == sum(len(row["response_ids"]) for row in table.to_pylist())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_directory_of_datasets_has_the_same(filled: Filled, tmp_path: Path) -> None:
    report = export_cache(filled.cache, tmp_path / "rows", response_set="sampled")
    dataset = load_from_disk(str(tmp_path / "rows"))
    assert isinstance(dataset, Dataset)
    assert dataset.to_list() == expected(filled.cache, "sampled")
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "rows").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def scored_set(rows: list[Any], **scoring: Any) -> ScoredSet:
    responses = make_response_set(INFO, response_rows(0, ["a", "b", "c"]))
    changed = replace(SCORING, **scoring)
    return ScoredSet(responses, changed, SignalTable([plain_table(rows, plain_schema(SCORING.top_k))]))


def test_without_a_reference_advantages_are_null() -> None:
    responses = make_response_set(INFO, response_rows(0, ["a", "b", "c"]))
    table = pa.concat_tables(plain_rows.joined_tables(scored_set(signal_rows(responses, 0, reference=False))))
    for column in ("token_advantages", "topk_advantages"):
        assert table[column].null_count == 3
    assert table["topk_logprobs"].null_count == 0


def test_padding_is_left_out() -> None:
    responses = make_response_set(INFO, response_rows(0, ["a", "b", "c"]))
    rows = signal_rows(responses, 0)
    for number, row in enumerate(rows):
        row.topk_ids[:, 1 + number :] = -1
    table = pa.concat_tables(plain_rows.joined_tables(scored_set(rows)))
    for number, row in enumerate(rows):
        for column in ("topk_ids", "topk_logprobs", "topk_advantages"):
            values = getattr(row, column)[:, : 1 + number]
            assert table[column][number].as_py() == values.astype(np.float32).tolist()


def refused(error: type[AdpaError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        export_cache(*arguments, **options)
    return str(caught.value)


def test_what_cannot_be_written_is_refused(filled: Filled, tmp_path: Path) -> None:
    output = tmp_path / "rows"
    assert "3 combinations of responses and scoring fit" in refused(CacheError, filled.cache, output)
    assert "--response-set f00d: the cache has none; name one of these:\n" in refused(
        CacheError, filled.cache, output, response_set="f00d"
    )
    assert "no cache there" in refused(CacheError, tmp_path, output)
    assert "cannot be written there" in refused(OptionError, filled.cache, output / "in" / "it", response_set="chosen")
    inside = filled.cache / "responses" / "rows.parquet"
    assert "lies in the cache" in refused(OptionError, filled.cache, inside, response_set="chosen")
    output.write_text("mine")
    assert "not a local path" in refused(OptionError, filled.cache, Path("s3://bucket/rows"), response_set="chosen")
    assert f"--output {output}: there already" in refused(OptionError, filled.cache, output, response_set="chosen")
    assert output.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize(("name", "is_file"), [("rows.PARQUET", True), ("rows", False), ("rows-1.5", False)])
def test_the_ending_says_the_form(name: str, is_file: bool, filled: Filled, tmp_path: Path) -> None:
    export_cache(filled.cache, tmp_path / name, response_set="chosen")
    assert (tmp_path / name).is_file() is is_file
    rows = pq.read_table(tmp_path / name) if is_file else load_from_disk(tmp_path / name)
    assert len(rows) == 8


@pytest.mark.parametrize("name", ["rows.parquet", "rows"])
def test_a_failure_in_the_middle_leaves_nothing(
    name: str, filled: Filled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plain_rows, "TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(plain_rows, "_nested_column", fails)
    with pytest.raises(OSError, match="disk full"):
        export_cache(filled.cache, tmp_path / name, response_set="chosen")
    assert list(tmp_path.iterdir()) == []


def test_the_command_needs_no_cache_of_its_own(filled: Filled, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(filled.cache, tmp_path / "cache"))
    options = ["--output", str(tmp_path / "rows"), "--response-set", "rejected"]
    done = CliRunner().invoke(cli.app, ["cache", "export", str(cache), *options])
    assert (done.exit_code, done.stderr) == (0, "")
    shutil.rmtree(cache)
    assert len(load_from_disk(str(tmp_path / "rows"))) == 8

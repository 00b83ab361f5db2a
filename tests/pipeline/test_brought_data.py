"""What people bring: a table of their own with other names, compressed, in slices; from the file to the cache."""

import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Models, Row, WriteRows

from adpa import evaluate, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.preferences import parse_pair
from adpa.data.rows import read_rows
from adpa.errors import DataError

MAP = "prompt=question,chosen=answer_a,rejected=answer_b"
TEXTS: list[Row] = [
    {"question": f"What is {n} + {n}?", "answer_a": f"{2 * n}", "answer_b": 'He said "none",\nor null'}
    for n in range(6)
]


def table(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def ask(models: Models, tmp_path: Path) -> dict[str, Any]:
    return {"teacher": str(models.teacher), "cache": tmp_path / "cache", "top_k": 5}


def test_a_table_of_ones_own_becomes_the_pairs_of_ordinary_data(ask: dict[str, Any], tmp_path: Path) -> None:
    own = tmp_path / "own.csv.gz"
    own.write_bytes(gzip.compress(table(TEXTS), mtime=0))
    renamed = [dict(zip(("prompt", "chosen", "rejected"), row.values(), strict=True)) for row in TEXTS]
    (tmp_path / "plain.jsonl").write_bytes(lines(renamed))
    plain = precompute(**ask, data=str(tmp_path / "plain.jsonl"))
    brought = precompute(**ask, data=str(own), map=MAP, limit=99)
    assert (plain.scored, brought.rows, brought.reused) == (12, 6, 12)
    assert brought.responses == plain.responses
    ids = {parse_pair("", row).example_id for row in renamed}
    sets = list(read_response_sets(ask["cache"]))
    assert all({*one.table["example_id"].to_pylist()} == ids for one in sets)
    asked = "limit 99 map chosen=answer_a,prompt=question,rejected=answer_b"
    assert {one.record.source for one in sets if one.record} == {f"{own} {asked}"}


def test_pairs_are_the_same_in_every_form(preference_rows: list[Row], tmp_path: Path) -> None:
    """Cells of a CSV file hold their messages as JSON."""
    cells = [{name: json.dumps(value, ensure_ascii=False) for name, value in row.items()} for row in preference_rows]
    contents = {
        "a.jsonl": lines(preference_rows),
        "b.json.gz": gzip.compress(json.dumps(preference_rows).encode()),
        "c.csv": table(cells),
        "d.csv.xz": lzma.compress(table(cells)),
    }
    ids = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        ids.append([parse_pair(where, row).example_id for where, row in read_rows(tmp_path / name)])
    assert len({*ids[0]}) == len(preference_rows)
    assert ids == [ids[0]] * len(contents)


def test_a_limit_and_a_slice_read_the_same_first_rows(
    ask: dict[str, Any], preference_rows: list[Row], write_rows: WriteRows
) -> None:
    data = str(write_rows(preference_rows[:8]))
    limited = precompute(**ask, data=data, limit=3)
    sliced = precompute(**ask, data=data, split="train[:3]")
    later = precompute(**ask, data=data, split="train[1:]", limit=3)
    assert (limited.rows, limited.used, limited.scored) == (3, 3, 6)
    assert (sliced.scored, sliced.responses) == (0, limited.responses)
    assert (later.rows, later.scored) == (3, 2)


def test_rows_that_lack_a_column_of_the_map_are_dropped_and_counted(ask: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(lines([*TEXTS[:2], {"question": "?", "answer_a": "x"}, {"answer_b": "y"}]))
    report = precompute(**ask, data=str(tmp_path / "own.jsonl"), map=MAP, drop_invalid=True, dry_run=True)
    assert (report.used, report.dropped_by_reason) == (2, {"columns of --map": 2})


def test_the_first_rows_decide_whether_data_can_be_used(ask: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(lines([{"question": "?"}, *TEXTS]))
    with pytest.raises(DataError, match=r"found no row that can be used: dropped 1 \(columns of --map: 1\)"):
        precompute(**ask, data=str(tmp_path / "own.jsonl"), map=MAP, drop_invalid=True, limit=1)


@pytest.mark.slow
def test_evaluate_reads_the_same_forms(models: Models, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(table(TEXTS))
    report = evaluate(
        str(models.student),
        str(models.other_student),
        str(models.teacher),
        str(models.reference),
        str(tmp_path / "own.csv"),
        split="train[1:]",
        limit=3,
        map=MAP,
        max_new_tokens=2,
    )
    assert report.prompts == 3

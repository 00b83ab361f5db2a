"""Data that cannot be used: one line, the same in Python and on the command line, that names the place once."""

import json
from pathlib import Path

import pytest
from tests.conftest import Models
from typer.testing import CliRunner

from adpa import cli, precompute
from adpa.errors import DataError

GOOD = '{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}'
DROP = "mend or remove the row, or pass --drop-invalid"
FILES = {
    "picture.jsonl": (
        b"\x89PNG\r\n\x1a\n\0",
        ": expected JSONL, JSON, CSV or Parquet; found a picture (PNG); check --data",
    ),
    "wide.json": (GOOD.encode("utf-16"), ": expected UTF-8 text; found UTF-16; save the file as UTF-8"),
    "empty.jsonl": (b"", ": found no rows: the file is empty; check --data"),
    "lines.parquet": (GOOD.encode(), ": expected a Parquet file; found JSONL; give it the suffix .jsonl"),
    "table.csv": (
        b"prompt,chosen,rejected\n",
        ": found no rows; expected at least one preference pair; check --data",
    ),
    "cut.jsonl": (
        f"{GOOD}\n{GOOD[:30]}".encode(),
        " line 2: broken JSON: it ends inside the string that begins at column 28; "
        "mend the row, or pass --drop-invalid",
    ),
    "null.jsonl": (
        f"{GOOD}\n{GOOD.replace(json.dumps('No'), 'null')}".encode(),
        f" line 2: `rejected` is null; expected chat messages or a string; {DROP}",
    ),
    "number.json": (
        f"[{GOOD.replace(json.dumps('Hello'), '5')}]".encode(),
        f" row 1: `chosen` is 5; expected chat messages or a string; {DROP}",
    ),
    "strings.json": (
        b'["a", "b"]',
        " row 1: found a string; expected an object with `chosen` and `rejected` "
        f"(first of 2 invalid rows; not a preference pair: 2); {DROP}",
    ),
    "columns.jsonl": (
        b'{"question": "Hi", "accepted": "Hello", "rejected_response": "No"}',
        " line 1: found the columns question, accepted, rejected_response; expected `chosen` and `rejected`; "
        "pass --map prompt=question,chosen=accepted,rejected=rejected_response",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_python_and_the_command_line_refuse_data_with_the_same_line(
    name: str, models: Models, runner: CliRunner, tmp_path: Path
) -> None:
    content, problem = FILES[name]
    path, cache = tmp_path / name, tmp_path / "cache"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        precompute(str(models.teacher), str(path), cache)
    assert str(caught.value) == f"{path}{problem}"
    command = ["precompute", "--teacher", str(models.teacher), "--data", str(path), "--cache", str(cache)]
    done = runner.invoke(cli.app, command)
    assert (done.exit_code, done.stderr) == (2, f"adpa: {path}{problem}\n")
    assert not cache.exists()

"""Exports a response set with its scoring to files that need no adpa: Parquet, or a directory of ``datasets``."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Doc

from adpa.data.cache.choice import made_from
from adpa.data.cache.format import check_cache
from adpa.data.cache.locations import check_name, check_outside, check_writable_file
from adpa.data.cache.plain_rows import SCHEMA, joined_tables
from adpa.data.cache.selection import ScoredSet, select_one_scored
from adpa.errors import OptionError
from adpa.pipeline.option_checks import check_not_empty, takes_options
from adpa.pipeline.options import CacheArgument, Group, ResponseSetOption, ScoringOption
from adpa.progress import progress

PARQUET = ".parquet"


@dataclass(frozen=True)
class ExportReport:
    """The result of ``export_cache``.

    Attributes:
        output: the file or directory.
        response_set: name and id of the set.
        data: the data that the set was made from, and when; and of how many versions it is the newest.
        scoring: id of the scoring.
        rows: responses.
        tokens: their tokens.
        bytes: bytes written.
        left_out: a line about each response set that no scoring covers whole.
    """

    output: str
    response_set: str
    data: str
    scoring: str
    rows: int
    tokens: int
    bytes: int
    left_out: list[str]


@takes_options
def export_cache(
    cache: CacheArgument,
    output: Annotated[
        Path,
        Doc("What to write, locally: a Parquet file, which ends with .parquet, or a directory of datasets."),
        Group.DECIDE,
    ],
    response_set: ResponseSetOption = None,
    scoring: ScoringOption = None,
) -> ExportReport:
    """Write a response set and its signals as plain columns.

    The file is Parquet, or a directory for datasets.load_from_disk. The columns are example_id, prompt_ids,
    response_ids, token_logprobs, token_advantages, topk_ids, topk_logprobs, topk_advantages (lists of lists) and
    tail_logprob. Without a reference, advantages are null. Of several versions of one data set the newest is taken. If
    other response sets or scorings fit, the error lists them.

    Raises:
        AdpaError: something about the arguments or the cache that the caller can fix.
    """
    check_not_empty({"--response-set": response_set, "--scoring": scoring})
    _check_output(output)
    check_cache(cache)
    check_outside("--output", output, cache)
    scored, left_out = select_one_scored(cache, scoring, response_set)
    tokens = 0
    with _unfinished(output) as folder:
        pieces = _with_progress(scored)
        if output.suffix.lower() == PARQUET:
            whole = folder / "rows.parquet"
            with pq.ParquetWriter(whole, SCHEMA) as writer:
                tokens = _write(pieces, writer.write_table)
        else:
            # datasets reads this file by memory map and copies it, piece by piece.
            with pa.ipc.new_stream(folder / "rows.arrow", SCHEMA) as stream:
                tokens = _write(pieces, stream.write_table)
            whole = folder / "dataset"
            _save_dataset(folder / "rows.arrow", whole)
        whole.rename(output)
    return ExportReport(
        output=str(output),
        response_set=scored.responses.shard_prefix(),
        data=made_from(scored, scored.newest_of),
        scoring=scored.scoring.id,
        rows=len(scored.responses),
        tokens=tokens,
        bytes=sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file()),
        left_out=left_out,
    )


def _check_output(output: Path) -> None:
    check_name("--output", output)
    if os.path.lexists(output):
        raise OptionError(f"--output {output}: there already", "name a new file or directory")
    ending, stem = output.suffix.lower(), output.name.partition(".")[0] or "rows"
    if ending not in ("", PARQUET) and not ending[1:].isdigit():  # rows-1.5 is the name of a directory
        raise OptionError(
            f"--output {output}: found the ending {output.suffix}; expected {PARQUET}, or none for a directory",
            f"name {stem}{PARQUET} or {stem}",
        )
    check_writable_file("--output", output)


def _with_progress(scored: ScoredSet) -> Iterator[pa.Table]:
    with progress("exporting: responses", len(scored.responses)) as advance:
        for table in joined_tables(scored):
            yield table
            advance(len(table))


def _write(pieces: Iterator[pa.Table], write: Callable[[pa.Table], None]) -> int:
    """Writes tables; returns the number of their response tokens."""
    tokens = 0
    for table in pieces:
        write(table)
        tokens += len(table["token_logprobs"].combine_chunks().values)
    return tokens


def _save_dataset(rows: Path, directory: Path) -> None:
    import datasets  # takes a second, and only this form needs it

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_file(str(rows)).save_to_disk(directory)
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output; its content becomes the output when it is complete."""
    folder = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)

"""An undamaged cache, and every fault that a cache can have: detected, named, and repaired."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.pipeline.conftest import Filled
from transformers import AutoTokenizer
from typer.testing import CliRunner

from adpa import VerifyReport, cli, pack_cache, precompute, verify_cache
from adpa.data.cache.compact import compact_table
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.shards import read_shard, write_shard
from adpa.data.cache.signal_rows import plain_schema, plain_table
from adpa.data.cache.signals import read_scorings, read_signals, write_scoring, write_signals
from adpa.errors import CacheError, DamagedFileError, OptionError
from adpa.pipeline.cache import verify as cache_verify


@pytest.fixture
def cache(few_words: Filled, tmp_path: Path) -> Path:
    """A copy of a filled cache."""
    return Path(shutil.copytree(few_words.cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def vocabulary(few_words: Filled) -> int:
    """How many tokens there are."""
    return len(AutoTokenizer.from_pretrained(few_words.models.teacher))


def arrow_files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.arrow"))


def resume(cache: Path, filled: Filled) -> tuple[int, int]:
    """Runs the fixture's two commands again; returns the rows that each scored."""
    common: dict[str, Any] = {
        "teacher": str(filled.models.teacher),
        "reference": str(filled.models.reference),
        "data": str(filled.data),
        "cache": cache,
        "top_k": 10,
    }
    sampled: dict[str, Any] = {"student": str(filled.models.student), "samples_per_prompt": 2, "max_new_tokens": 6}
    return precompute(**common).scored, precompute(**common, **sampled).scored


def places(report: VerifyReport) -> set[str]:
    return {fault.place for fault in report.faults}


def test_a_whole_cache_has_no_fault(filled: Filled) -> None:
    report = verify_cache(filled.cache)
    assert (report.faults, report.failure, report.unknown) == ([], "", [])
    (scoring,) = read_scorings(filled.cache)
    signals = len(read_signals(filled.cache, scoring))
    assert report.rows == sum(map(len, read_response_sets(filled.cache))) + signals + 16, "and the samples"
    assert report.files == sum(path.is_file() for path in filled.cache.rglob("*"))


def test_one_bit_anywhere_in_any_file_is_found(filled: Filled, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(filled.cache, tmp_path / "cache"))
    dice, files = random.Random(0), sorted(path for path in cache.rglob("*") if path.is_file())
    for path in files:
        flipped = bytearray(path.read_bytes())
        flipped[dice.randrange(len(flipped))] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
    expected = {path.relative_to(cache).as_posix() for path in files}
    tokenizers = {place for place in expected if place.startswith("tokenizers/")}
    folders = {place.rpartition("/")[0] for place in tokenizers}
    assert places(verify_cache(cache)) == (expected - tokenizers) | folders


def test_a_marker_that_may_be_of_another_program_is_told_as_such(cache: Path) -> None:
    (cache / "cache.json").write_text("[]")
    (fault,) = verify_cache(cache).faults
    assert (fault.place, fault.problem) == ("cache.json", "damaged, or of another program: not a JSON object")


def test_a_marker_in_a_directory_that_is_no_cache_is_left_where_it_is(tmp_path: Path) -> None:
    marker = tmp_path / "cache.json"
    marker.write_text('["entries"]')
    (tmp_path / "responses").mkdir()
    for repair in (False, True):
        with pytest.raises(DamagedFileError, match="damaged, or of another program"):
            verify_cache(tmp_path, repair=repair)
    assert marker.read_text() == '["entries"]'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache.json", "responses"]


def test_a_cut_an_empty_and_a_renamed_shard_are_found(cache: Path) -> None:
    cut, empty, renamed = arrow_files(cache)[:3]
    cut.write_bytes(cut.read_bytes()[:-1])
    empty.write_bytes(b"")
    renamed = renamed.rename(renamed.with_name(renamed.name[:-9] + "0000.arrow"))
    assert places(verify_cache(cache)) == {path.relative_to(cache).as_posix() for path in (cut, empty, renamed)}


def rewrite_signals(cache: Path, change: Callable[..., Any]) -> str:
    """Writes changed rows of a scoring with the right digest; returns the place of the shard."""
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    rows = [signals.row(number) for number in range(len(signals))]
    for path in (cache / "scorings" / scoring.id).glob("signals-*"):
        path.unlink()
    write_signals(cache, scoring, [change(row) for row in rows])
    (path,) = (cache / "scorings" / scoring.id).glob("signals-*")
    return path.relative_to(cache).as_posix()


def test_a_wrong_number_under_a_right_digest_is_found(cache: Path) -> None:
    place = rewrite_signals(cache, lambda row: replace(row, topk_ids=row.topk_ids + (1 << 24)))
    report = verify_cache(cache)
    (scoring,) = read_scorings(cache)
    fault = next(fault for fault in report.faults if "vocabulary" in fault.problem)
    assert (fault.place, fault.rows) == (place, len(read_signals(cache, scoring)))
    assert "row 0, key " in fault.problem


def test_signals_of_other_responses_are_found(cache: Path) -> None:
    keys: list[bytes] = []

    def exchanged(row: Any) -> Any:
        keys.append(row.key)
        return replace(row, key=keys[-2] if len(keys) % 2 == 0 else row.key[::-1])

    place = rewrite_signals(cache, exchanged)
    report = verify_cache(cache)
    assert places(report) == {place}
    assert any(word in report.faults[0].problem for word in ("not as long", "other log-probabilities"))


def rewrite_set(cache: Path, change: Callable[[pa.Table], pa.Table]) -> str:
    """Writes changed chosen responses with the right digests of file and id; returns their place."""
    chosen = next(one for one in read_response_sets(cache) if one.info.name == "chosen")
    for path in (cache / "responses").glob("chosen-*"):
        path.unlink()
    changed = replace(chosen, table=change(chosen.table))
    return f"responses/{write_shard(cache / 'responses', changed.shard_prefix(), changed.table).name}"


def with_ids(table: pa.Table, column: str, ids: list[int]) -> pa.Table:
    values = table[column].to_pylist()
    values[3] = ids
    place = table.column_names.index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda table: with_ids(table, "prompt_ids", [1, 2, 3]), "row 3: the key is not the digest"),
        (lambda table: with_ids(table, "response_ids", [10_000]), "row 3: ids that the vocabulary lacks"),
        (lambda table: with_ids(table, "response_ids", [-1]), "row 3: ids that the vocabulary lacks"),
        (lambda table: with_ids(table, "prompt_ids", []), "row 3: an empty prompt or response"),
        (lambda table: table.slice(1), "not those of its rows"),
        (lambda table: table.take([1, 0, *range(2, len(table))]), "not those of its rows"),
    ],
)
def test_a_set_that_is_not_what_its_rows_make_is_found(
    change: Callable[[pa.Table], pa.Table], problem: str, cache: Path
) -> None:
    place = rewrite_set(cache, change)
    report = verify_cache(cache)
    assert places(report) == {place}
    assert any(problem in fault.problem for fault in report.faults)


def test_a_set_under_another_id_is_found(cache: Path) -> None:
    path = next((cache / "responses").glob("chosen-*"))
    moved = path.rename(path.with_name(path.name.replace("chosen-", "chosen-f")))
    (fault,) = verify_cache(cache).faults
    assert (fault.place, fault.problem) == (f"responses/{moved.name}", "its content does not match the id in its name")


def test_samples_without_a_token_are_found(cache: Path) -> None:
    path = next((cache / "samples").rglob("*.arrow"))
    table = read_shard(path)
    path.unlink()
    wrong = write_shard(path.parent, "samples", with_ids(table, "response_ids", []))
    (fault,) = verify_cache(cache).faults
    assert (fault.place, fault.rows) == (Path(str(wrong)).relative_to(cache).as_posix(), 1)


def test_what_is_missing_is_told(cache: Path) -> None:
    tokenizer = next((cache / "tokenizers").iterdir())
    shutil.rmtree(tokenizer)
    (scoring,) = read_scorings(cache)
    ((cache / "scorings" / scoring.id) / "scoring.json").unlink()
    report = verify_cache(cache)
    actual = {fault.place: fault.problem for fault in report.faults}
    assert actual.keys() == {f"tokenizers/{tokenizer.name}", f"scorings/{scoring.id}/scoring.json"}
    assert all(problem.startswith("missing") for problem in actual.values())


def test_a_changed_scoring_and_a_changed_tokenizer_are_found(cache: Path, vocabulary: int) -> None:
    (scoring,) = read_scorings(cache)
    path = (cache / "scorings" / scoring.id) / "scoring.json"
    path.write_text(path.read_text().replace('"top_k": 10', '"top_k": 11'))
    tokenizer = next((cache / "tokenizers").iterdir())
    description = json.loads((tokenizer / "tokenizer.json").read_text())
    description["model"]["vocab"]["adpa"] = vocabulary
    (tokenizer / "tokenizer.json").write_text(json.dumps(description))
    assert places(verify_cache(cache)) == {f"scorings/{scoring.id}/scoring.json", f"tokenizers/{tokenizer.name}"}


def test_what_is_not_the_caches_is_told_and_is_no_fault(cache: Path) -> None:
    (cache / "notes.txt").write_text("mine")
    (cache / "responses" / f".chosen-0.arrow.{0:032x}").write_bytes(b"half")
    (cache / "damaged").mkdir()
    (cache / "damaged" / "file").write_bytes(b"")
    report = verify_cache(cache)
    assert (report.faults, report.unknown, report.unfinished, report.damaged) == ([], ["notes.txt"], 1, 1)


def test_pending_rows_are_checked_as_the_teachers_alone(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    row = replace(signals.row(0), token_advantages=None, topk_advantages=None)
    wide = replace(row, topk_logprobs=row.topk_logprobs.astype(np.float32))
    schema = plain_schema(scoring.top_k, logprob_type=pa.float32())
    write_shard((cache / "scorings" / scoring.id) / "pending", "teacher", plain_table([wide], schema))
    assert verify_cache(cache).faults == []
    path = write_shard((cache / "scorings" / scoring.id) / "pending", "teacher", plain_table([wide], schema))
    path.write_bytes(path.read_bytes() + b"1")
    assert places(verify_cache(cache)) == {Path(str(path)).relative_to(cache).as_posix()}


def test_repair_sets_aside_and_precompute_scores_the_lost_rows_again(cache: Path, few_words: Filled) -> None:
    (scoring,) = read_scorings(cache)
    shard = sorted((cache / "scorings" / scoring.id).glob("signals-*"))[0]
    lost = len(read_shard(shard))
    chosen = next((cache / "responses").glob("chosen-*"))
    damaged = [shard, chosen]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    report = verify_cache(cache, repair=True)
    assert report.set_aside == sorted(f"damaged/{path.relative_to(cache).as_posix()}" for path in damaged)
    assert all((cache / place).exists() for place in report.set_aside)
    assert not any(path.exists() for path in damaged)
    assert "run the same adpa precompute again" in report.failure
    assert verify_cache(cache).faults == [], "what is left is whole"
    assert sum(resume(cache, few_words)) == lost
    assert verify_cache(cache).faults == []
    (again,) = read_scorings(cache)
    assert read_signals(cache, again).keys() == read_signals(few_words.cache, scoring).keys()


def test_repair_of_a_tokenizer_and_of_a_description_leaves_no_gap_for_long(cache: Path, few_words: Filled) -> None:
    (scoring,) = read_scorings(cache)
    ((cache / "scorings" / scoring.id) / "scoring.json").write_text("{")
    tokenizer = next((cache / "tokenizers").iterdir())
    (tokenizer / "tokenizer.json").write_text("{")
    report = verify_cache(cache, repair=True)
    assert places(report) == {f"scorings/{scoring.id}/scoring.json", f"tokenizers/{tokenizer.name}"}
    assert not tokenizer.exists()
    assert resume(cache, few_words) == (0, 0), "the rows were whole"
    assert verify_cache(cache).faults == []


def test_a_fault_is_exit_code_1_and_the_files_name(cache: Path, tmp_path: Path) -> None:
    verify = partial(CliRunner().invoke, cli.app)
    done = verify(["cache", "verify", str(cache)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith("no fault in ")
    (scoring,) = read_scorings(cache)
    shard = sorted((cache / "scorings" / scoring.id).glob("signals-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    done = verify(["cache", "verify", str(cache), "--report", str(tmp_path / "report.json")])
    place = shard.relative_to(cache).as_posix()
    assert done.exit_code == 1
    assert place in done.stdout.replace("\n", "")
    assert done.stderr == f"adpa: {cache}: 1 fault in {place}; --repair sets damaged files aside\n"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == [asdict(fault) for fault in verify_cache(cache).faults]
    done = verify(["cache", "verify", str(cache), "--repair"])
    assert done.exit_code == 1
    assert "set aside under damaged/" in done.stderr
    assert verify(["cache", "verify", str(cache)]).exit_code == 0


def test_the_programme_ends_without_a_traceback(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrow_files(cache)[0].write_bytes(b"")
    monkeypatch.setattr(sys, "argv", ["adpa", "cache", "verify", str(cache)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code, len(capsys.readouterr().err.splitlines())) == (1, 1)


def test_findings_have_a_line_between_them(cache: Path) -> None:
    for path in arrow_files(cache)[:2]:
        path.write_bytes(b"")
    lines = CliRunner().invoke(cli.app, ["cache", "verify", str(cache)]).stdout.splitlines()
    assert lines.count("") == 2
    assert lines[-1].startswith("2 faults in ")


def test_a_pack_at_any_moment_is_no_fault_and_every_row_is_checked(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It packs before one call that reads a shard; the old files are missing for all later calls."""
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    for path in (cache / "scorings" / scoring.id).glob("signals-*"):
        path.unlink()
    for number in range(6):
        write_signals(cache, scoring, [signals.row(number)])
    rows, shards = verify_cache(cache).rows, len(arrow_files(cache))
    for moment in range(7):  # six files of signals and one of samples are read
        disturbed, calls = Path(shutil.copytree(cache, cache.with_name(f"{moment}"))), iter(range(10**9))

        def read(path: Path, disturbed: Path = disturbed, calls: Any = calls, moment: int = moment) -> pa.Table:
            if next(calls) == moment:
                pack_cache(disturbed)
            return read_shard(path)

        monkeypatch.setattr(cache_verify, "read_shard", read)
        report = verify_cache(disturbed)
        assert report.faults == []
        assert rows <= report.rows <= rows + 6, "those that were checked before are checked again in the new file"
        assert len(arrow_files(disturbed)) == shards - 5


def test_files_that_vanish_again_and_again_are_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(path: Path) -> pa.Table:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(cache_verify, "read_shard", vanished)
    with pytest.raises(CacheError, match="a listed file is missing"):
        verify_cache(cache)


def test_what_cannot_be_verified_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        verify_cache(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OptionError, match="cannot be written"):
        verify_cache(cache, repair=True)
    assert verify_cache(cache).faults == []


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "folder"])
def test_what_readers_refuse_as_no_file_is_a_fault(kind: str, cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    places_of_rows = [f"scorings/{scoring.id}/signals-0.arrow", "responses/chosen-0-0.arrow"]
    for place in places_of_rows:
        if kind == "folder":
            (cache / place).mkdir()
        else:
            (cache / place).symlink_to("nowhere" if kind == "link to nothing" else Path(place).name)
    (cache / "link").symlink_to("nowhere")
    report = verify_cache(cache)
    assert [fault.place for fault in report.faults] == places_of_rows[::-1]
    assert {fault.problem for fault in report.faults} == {
        "not a file or a link to one: remove it, or restore what it leads to"
    }
    assert "link" in report.unknown
    assert places(verify_cache(cache, repair=True)) == set(places_of_rows), "there is nothing to set aside"


@pytest.mark.parametrize("value", [None, float("nan"), -1.0])
def test_lossy_rows_without_their_errors_are_found(value: float | None, cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    signals, lossy = read_signals(cache, scoring), replace(scoring, lossy=True)
    write_scoring(cache, lossy)
    table = compact_table([signals.row(0), signals.row(1)], scoring.top_k, lossy=True)
    assert verify_cache(cache).faults == []
    place = table.column_names.index("kl_error")
    values = pa.array([0.0, value], pa.float32())
    path = write_shard(lossy.folder(cache), "signals", table.set_column(place, "kl_error", values))
    (fault,) = verify_cache(cache).faults
    assert fault.place == Path(str(path)).relative_to(cache).as_posix()
    assert fault.problem == "row 1: rounding errors that are missing, or not numbers"

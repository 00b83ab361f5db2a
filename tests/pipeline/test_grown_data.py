"""README's four commands on data that grows, shrinks back, changes or moves; lists where the choice is not clear."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.conftest import Row
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner, Result

from adpa import cli, export_cache, inspect_cache, list_cache, precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.selection import select_scored
from adpa.data.cache.shards import list_shards, write_shard
from adpa.errors import ListedError
from adpa.pipeline.terminal.cache import show_listing

SCORE = "precompute --teacher T --data prefs.jsonl --cache CACHE"
DCKD = "distill --objective dckd --student S --cache CACHE --output runs/dckd"
SAMPLE = "precompute --teacher T --reference R --student runs/dckd --data prefs.jsonl --cache CACHE --max-new-tokens 6"
ADPA = "distill --objective adpa --student runs/dckd --cache CACHE --output runs/adpa-plus"


@dataclass
class User:
    """Someone in a directory with T, R, S and prefs.jsonl, who types commands."""

    folder: Path
    rows: list[Row]

    def write(self, rows: list[Row], name: str = "prefs.jsonl") -> None:
        """Writes the pairs."""
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def type(self, command: str) -> Result:
        """Types a command after ``adpa``."""
        return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, command.split())

    def run(self, command: str) -> dict[str, Any]:
        """Types a command that must work; gives its report."""
        done = self.type(f"{command} --report {self.folder / 'report.json'}")
        assert done.exit_code == 0, done.output
        report: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        if "data" in report:
            assert report["data"] in " ".join(done.stdout.split())
        return report

    def refused(self, command: str) -> list[str]:
        """Types a command that must be refused; gives the lines on standard error, which are a list."""
        done = self.type(command)
        assert (done.exit_code, done.stdout) == (2, "")
        first, *lines = done.stderr.splitlines()
        assert first.endswith(
            "combinations of responses and scoring fit; choose one by the options at the end of its line:"
        )
        assert first.startswith(f"adpa: {len(lines)} ")
        return [line.removeprefix("  ") for line in lines]


@pytest.fixture
def user(few_words: Filled, preference_rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    for name, model in (("T", "teacher"), ("R", "reference"), ("S", "student")):
        (tmp_path / name).symlink_to(getattr(few_words.models, model))
    monkeypatch.chdir(tmp_path)
    user = User(tmp_path, preference_rows)
    user.write(preference_rows[:4])
    return user


@pytest.mark.slow
def test_the_four_commands_work_again_when_lines_were_appended(user: User) -> None:
    first = [user.run(command) for command in (SCORE, DCKD, SAMPLE, ADPA)]
    user.write(user.rows[:6])
    assert user.run(SCORE)["reused"] == 8
    dckd = user.run(f"{DCKD}-2 --num-train-epochs 3 --learning-rate 0.01")  # so that it is another student
    assert dckd["data"].startswith(f"newest of 2 sets made from {user.folder}/prefs.jsonl (20")
    assert (first[1]["examples"], dckd["examples"]) == (4, 6)
    assert first[1]["data"].startswith(f"{user.folder}/prefs.jsonl (20")

    user.run(SAMPLE)  # literally: of the first student
    adpa = user.run(f"{ADPA}-2")
    assert adpa["data"].startswith(f"newest of 2 sets made from {user.folder}/prefs.jsonl (20")
    assert (first[3]["examples"], adpa["examples"]) == (4, 6)
    record = json.loads((user.folder / "runs" / "adpa-plus-2" / "adpa.json").read_text())
    assert (record["data"], record["responses"]) == (adpa["data"], adpa["responses"])

    user.run(SAMPLE.replace("runs/dckd", "runs/dckd-2"))  # and of the second
    newest = user.run(ADPA.replace("runs/dckd", "runs/dckd-2") + "-3")
    assert newest["data"].startswith(f"{user.folder}/prefs.jsonl (20")
    assert newest["examples"] == 6


@pytest.mark.parametrize("last", ["shrunk back", "changed in place"])
def test_the_last_state_of_the_file_is_trained_on(last: str, user: User) -> None:
    user.run(SCORE)
    user.write(user.rows[:6])
    user.run(SCORE)
    changed = [*user.rows[:3], user.rows[3] | {"chosen": user.rows[4]["chosen"]}]
    user.write(user.rows[:4] if last == "shrunk back" else changed)
    expected = user.run(SCORE)
    trained = user.run(DCKD)
    assert (trained["examples"], trained["responses"]) == (4, expected["responses"])
    assert trained["data"].startswith(f"newest of {2 if last == 'shrunk back' else 3} sets made from ")


def another_path(user: User) -> None:
    shutil.move("prefs.jsonl", "pairs.jsonl")
    user.write(user.rows[:6], "pairs.jsonl")
    user.run(SCORE.replace("prefs", "pairs"))


def another_length(user: User) -> None:
    user.run(f"{SCORE} --max-length 1500")


def an_older_version(user: User) -> None:
    """What an older version of adpa wrote has no record."""
    folder = user.folder / "CACHE" / "responses"
    for path, responses in zip(list_shards(folder), sets_by_file(user), strict=True):
        write_shard(
            folder,
            responses.shard_prefix(),
            responses.table.replace_schema_metadata({b"adpa": responses.table.schema.metadata[b"adpa"]}),
        )
        path.unlink()
    user.write(user.rows[:6])
    user.run(SCORE)


def two_teachers(user: User) -> None:
    user.run(SCORE.replace("--teacher T", "--teacher R"))


def sets_by_file(user: User) -> list[Any]:
    return sorted(read_response_sets(user.folder / "CACHE"), key=lambda one: one.shard_prefix())


CHANGES: dict[str, tuple[Callable[[User], None], str, str]] = {
    "moved": (another_path, "/pairs.jsonl (", "/prefs.jsonl ("),
    "another length": (another_length, "max length 1500: ", "max length 2048: "),
    "an older version": (an_older_version, "/prefs.jsonl (", ", data not recorded: "),
    "two teachers": (two_teachers, "teacher R, ", "teacher T, "),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_sets_that_differ_in_more_are_listed_and_a_line_is_copied(change: str, user: User) -> None:
    first = user.run(SCORE)
    happen, newer, older = CHANGES[change]
    happen(user)
    lines = user.refused(DCKD)
    assert len(lines) == 2
    if change != "two teachers":  # these scored the same sets
        assert newer in lines[0]
        assert older in lines[1]
    line = next(line for line in lines if older in line)
    assert newer not in line
    trained = user.run(f"{DCKD} {line.rpartition(': ')[2]}")
    assert (trained["responses"], trained["scoring"]) == (first["responses"], first["scoring"])


@pytest.mark.slow
def test_a_killed_run_on_grown_data_is_told_before_anything_is_trained(user: User) -> None:
    user.run(SCORE)
    user.write(user.rows[:6])
    user.run(SCORE)
    scored = sorted((user.folder / "CACHE" / "scorings").glob("*/signals-*"), key=lambda path: path.stat().st_mtime_ns)
    scored[-1].unlink()
    done = user.type(DCKD)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert "prefs.jsonl (20" in done.stderr
    assert "is newer than the responses that fit, but scoring " in done.stderr
    assert user.run(f"{DCKD} {done.stderr.rpartition(' with ')[2]}")["examples"] == 4
    user.run(SCORE)
    assert user.run(f"{DCKD}-2")["examples"] == 6


@pytest.mark.slow
def test_a_run_resumes_on_its_own_data_after_it_has_grown(user: User) -> None:
    user.run(SCORE)
    training = f"{DCKD} --batch-size 2 --save-steps 1"
    user.run(training)
    for name in ("model.safetensors", "checkpoint-2"):
        path = user.folder / "runs" / "dckd" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    user.write(user.rows[:6])
    user.run(SCORE)
    resumed = user.run(f"{training} --resume-from-checkpoint last")
    assert (resumed["examples"], resumed["steps"]) == (4, 2)
    assert resumed["data"].startswith(f"{user.folder}/prefs.jsonl (20")


def test_export_and_inspect_take_the_newest_of_a_name(user: User) -> None:
    cache = user.folder / "CACHE"
    user.run(SCORE)
    user.write(user.rows[:6])
    report = user.run(SCORE)
    chosen = f"chosen-{report['responses']['chosen']}"
    exported = user.run("cache export CACHE --response-set chosen --output rows.parquet")
    assert (exported["response_set"], exported["rows"]) == (chosen, 6)
    assert exported["data"].startswith(f"newest of 2 sets made from {user.folder}/prefs.jsonl (20")
    assert pq.read_metadata("rows.parquet").num_rows == 6
    example = (
        next(one for one in read_response_sets(cache) if one.shard_prefix() == chosen).table["example_id"][0].as_py()
    )
    for options in ("", " --html page.html", f" --example {example}"):
        shown = user.run(f"inspect CACHE --response-set CHOSEN{options}")
        assert [summary["response_set"] for summary in shown["summaries"]] == [chosen]
        assert shown["data"] == exported["data"]
    assert len(user.refused("inspect CACHE --html page.html")) == 4
    every = inspect_cache(cache)
    assert [summary.response_set for summary in every.summaries] == [
        one.responses.shard_prefix() for one in select_scored(cache)[0]
    ]
    assert (len(every.summaries), every.data, every.summaries[0].response_set) == (4, "", chosen)
    with pytest.raises(ListedError, match="4 combinations"):
        export_cache(cache, user.folder / "rows")


def test_the_listing_has_data_and_time_and_the_newest_first(user: User) -> None:
    user.run(SCORE)
    user.write(user.rows[:6], "more.jsonl")
    report = user.run(SCORE.replace("prefs", "more"))
    listing = list_cache(user.folder / "CACHE")
    assert [one.rows for one in listing.sets] == [6, 6, 4, 4]
    assert {one.name.partition("-")[2] for one in listing.sets[:2]} == set(report["responses"].values())
    record = listing.sets[0].record
    assert record is not None
    assert record.data == f"{user.folder}/more.jsonl"
    shown = user.type("cache ls CACHE").stdout
    assert f" from {record.describe()} " in " ".join(shown.split())
    assert json.loads(json.dumps(record.time)) == record.time
    assert show_listing(listing) is not None


def test_two_users_with_one_cache_and_one_name_of_a_file_are_kept_apart(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each types the same relative path in a directory of his own."""
    cache = user.folder / "CACHE"
    for number, name in enumerate(("ann", "bob")):
        (user.folder / name).mkdir()
        for model in "TRS":
            (user.folder / name / model).symlink_to(user.folder / model)
        monkeypatch.chdir(user.folder / name)
        user.write(user.rows[4 * number : 4 * number + 4], f"{name}/prefs.jsonl")
        user.run(SCORE.replace("CACHE", "../CACHE"))
    lines = user.refused(DCKD.replace("CACHE", "../CACHE"))
    assert [f"{user.folder}/bob/prefs.jsonl (" in lines[0], f"{user.folder}/ann/prefs.jsonl (" in lines[1]] == [
        True
    ] * 2
    assert {one.record and one.record.data for one in read_response_sets(cache)} == {
        f"{user.folder}/{name}/prefs.jsonl" for name in ("ann", "bob")
    }


@pytest.mark.slow
def test_parts_of_the_data_make_one_set_with_one_record(user: User) -> None:
    for part in ("1/2", "2/2"):
        user.run(f"{SCORE} --part {part}")
    assert len(list_shards(user.folder / "CACHE" / "responses")) == 2
    assert user.run(DCKD)["examples"] == 4


def test_a_hub_name_or_a_directory_is_recorded_as_what_it_is(user: User) -> None:
    from datasets import Dataset

    Dataset.from_list([dict(row) for row in user.rows[:4]]).save_to_disk("saved")
    precompute(teacher="T", data="saved/", cache=user.folder / "CACHE")
    assert {one.record and one.record.data for one in read_response_sets(user.folder / "CACHE")} == {
        f"{user.folder}/saved"
    }

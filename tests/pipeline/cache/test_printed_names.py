"""Every name of a response set or scoring that a command prints is taken by every option that takes one."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.cache.test_verify_written import add_changed
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, distill, export_cache, inspect_cache
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.selection import Need, select, select_scored
from adpa.data.cache.signals import read_scorings, read_signals, write_scoring, write_signals
from adpa.errors import ListedError
from adpa.pipeline.models.checkpoint import open_checkpoint

WIDE = {"COLUMNS": "400"}
ID = r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])"
A_SET, A_SCORING = r"(?:chosen|rejected|sampled)[- ](\w{16})\b", r"(?:^|scorings?[ /])(\w{16})\b"


@pytest.fixture(scope="module")
def cache(few_words: Filled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two sets of each name and two scorings, so that something has to be chosen."""
    cache = Path(shutil.copytree(few_words.cache, tmp_path_factory.mktemp("printed") / "cache"))
    for name in ("chosen", "rejected", "sampled"):
        add_changed(cache, name, chat_template_kwargs={"think": False})
    (scoring,) = read_scorings(cache)
    signals, other = read_signals(cache, scoring), replace(scoring, engine="hf, again")
    write_scoring(cache, other)
    write_signals(cache, other, [signals.row(number) for number in range(len(signals))])
    return cache


def printed(few_words: Filled, cache: Path, folder: Path) -> dict[str, str]:
    """What each command says about the cache, on both streams and in its report."""
    copy = Path(shutil.copytree(cache, folder / "copy"))
    models = few_words.models
    student, work = ["--student", str(models.student)], ["--data", str(few_words.data), "--cache", str(copy)]
    large = ["--teacher", str(models.teacher), "--reference", str(models.reference), "--top-k", "10"]
    sampling = ["--samples-per-prompt", "2", "--max-new-tokens", "6"]
    train = ["distill", "--objective", "kd", *student, "--cache", str(copy), "--max-steps", "1", "--batch-size", "4"]
    one = next(one for one in read_response_sets(cache) if one.info.name == "chosen")
    (scoring, _) = read_scorings(cache)
    chosen = ["--response-set", one.shard_prefix(), "--scoring", scoring.id]
    commands = {
        "ls": ["cache", "ls", str(copy)],
        "pack": ["cache", "pack", str(copy)],
        "precompute": ["precompute", *large, *work],
        "precompute samples": ["precompute", *large, *work, *student, *sampling],
        "inspect": ["inspect", str(copy)],
        "inspect one": ["inspect", str(copy), *chosen, "--count", "1", "--html", str(folder / "page.html")],
        "export": ["cache", "export", str(copy), *chosen, "--output", str(folder / "rows.parquet")],
        "export, refused": ["cache", "export", str(copy), "--output", str(folder / "others")],
        "inspect, refused": ["inspect", str(copy), "--response-set", "f00d"],
        "scoring, refused": ["inspect", str(copy), "--scoring", "f00d"],
        "distill": [*train, *chosen, "--output", str(folder / "out")],
        "distill, refused": [*train, "--output", str(folder / "other")],
        "distill, none": [*train, "--output", str(folder / "other"), "--response-set", "f00d"],
        "gc": ["cache", "gc", str(copy)],
    }
    row = read_signals(copy, scoring).row(0)
    write_signals(copy, scoring, [replace(row, key=b"n" * 16)])  # gc names the file
    said = {}
    for command, words in commands.items():
        report = folder / f"{command}.json"
        done = CliRunner(env=WIDE).invoke(cli.app, [*words, "--report", str(report)])
        assert done.exit_code == (2 if command.endswith(("refused", "none")) else 0), done.output
        said[command] = done.stdout + done.stderr + (report.read_text() if report.exists() else "")
    said["page"] = (folder / "page.html").read_text()
    said["adpa.json"] = (folder / "out" / "adpa.json").read_text()
    for path in sorted((copy / "responses").iterdir())[:2]:
        path.write_bytes(b"")
    other = Path(shutil.copytree(few_words.cache, folder / "other cache"))
    said["merge"] = CliRunner(env=WIDE).invoke(cli.app, ["cache", "merge", str(other), str(copy)]).output
    said["verify"] = CliRunner(env=WIDE).invoke(cli.app, ["cache", "verify", str(copy), "--repair"]).output
    said["gc, refused"] = CliRunner(env=WIDE).invoke(cli.app, ["cache", "gc", str(copy)]).output
    said["listing"] = "\n".join(str(path) for path in sorted(cache.rglob("*")))
    return said


def names_in(text: str, name: str) -> dict[str, str]:
    """The id in every word that has one id, and in every whole line that has one name."""
    found = {}
    for line in text.splitlines():
        for part in (line, *re.split(r"[\s\"'<>│]+", line)):
            ids = re.findall(name if " " in part else ID, part)
            if len(ids) == 1:
                found[part] = ids[0]
    return found


def test_every_printed_name_is_taken_by_every_option(
    cache: Path, few_words: Filled, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("said")
    said = printed(few_words, cache, folder)
    sets = {one.id: one for one in read_response_sets(cache)}
    scorings = {one.id: one for one in read_scorings(cache)}
    student = open_checkpoint(str(few_words.models.student)).identity.digest
    first = next(iter(scorings))
    counted = {}
    for command, text in said.items():
        named = {part: one for part, one in names_in(text, A_SET).items() if one in sets}
        for part, one in named.items():
            (scored,), _ = select_scored(cache, first, part)
            assert scored.responses.id == one, f"{command} printed {part!r}"
            needs = {sets[one].info.name: Need(signals=False, advantages=False)}
            (selected,) = select(cache, needs, student, None, [part]).sets.values()
            assert selected.id == one, f"{command} printed {part!r}"
        of_scorings = {part: one for part, one in names_in(text, A_SCORING).items() if one in scorings}
        for part, one in of_scorings.items():
            scored_sets, _ = select_scored(cache, part, "chosen")
            assert {scored.scoring.id for scored in scored_sets} == {one}, f"{command} printed {part!r}"
        counted[command] = (len({*named.values()}), len({*of_scorings.values()}))
    assert {command for command, numbers in counted.items() if numbers == (0, 0)} == set(), "each names something"
    assert counted["ls"] == counted["inspect"] == counted["export, refused"] == counted["listing"] == (6, 2)
    assert counted["precompute"] == counted["precompute samples"] == (2, 1)
    assert counted["distill"] == counted["adpa.json"] == counted["export"] == (1, 1)
    assert counted["inspect one"] == counted["page"] == (2, 1), "the reward accuracy compares it with the rejected set"


def test_the_options_of_the_commands_use_the_one_matcher(cache: Path, few_words: Filled, tmp_path: Path) -> None:
    path = sorted((cache / "responses").glob("chosen-*"))[1]
    scoring = sorted((cache / "scorings").iterdir())[1]
    expected = path.name[: len("chosen-") + 16]
    for name in (expected, path.name, str(path), path.name[7:15]):
        for place in (scoring.name, f"scorings/{scoring.name}", str(scoring), scoring.name[:8]):
            (summary,) = inspect_cache(cache, response_set=name, scoring=place, count=1).summaries
            assert (summary.response_set, summary.scoring) == (expected, scoring.name)
    exported = export_cache(cache, tmp_path / "rows.parquet", path.name, f"scorings/{scoring.name}")
    assert (exported.response_set, exported.scoring) == (expected, scoring.name)
    brief: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "scoring": str(scoring), "response_set": [str(path)]}
    distill("kd", str(few_words.models.student), cache, tmp_path / "out", **brief)
    record = json.loads((tmp_path / "out" / "adpa.json").read_text())
    assert (record["scoring"], record["responses"]) == (scoring.name, {"chosen": expected.partition("-")[2]})


def test_a_bare_name_means_all_its_sets_in_every_command(cache: Path, few_words: Filled, tmp_path: Path) -> None:
    summaries = inspect_cache(cache, response_set="chosen").summaries
    assert len({one.response_set for one in summaries}) == 2
    student = str(few_words.models.student)
    for refused in (
        lambda: export_cache(cache, tmp_path / "rows", "chosen"),
        lambda: distill("kd", student, cache, tmp_path / "out", response_set=["chosen"]),
    ):
        with pytest.raises(ListedError, match="4 combinations of responses and scoring fit") as caught:
            refused()
        _, *lines = str(caught.value).splitlines()
        assert len({re.findall("--response-set (chosen-.{16}) --scoring (.{16})$", line)[0] for line in lines}) == 4


@pytest.mark.parametrize("option", ["--response-set", "--scoring"])
@pytest.mark.parametrize("command", ["inspect", "export", "distill"])
def test_an_empty_name_is_one_line_in_every_command(
    command: str, option: str, cache: Path, few_words: Filled, tmp_path: Path
) -> None:
    words = {
        "inspect": ["inspect", str(cache)],
        "export": ["cache", "export", str(cache), "--output", str(tmp_path / "rows")],
        "distill": ["distill", "--objective", "kd", "--student", str(few_words.models.student), "--cache", str(cache)],
    }[command]
    words += ["--output", str(tmp_path / "out")] if command == "distill" else []
    done = CliRunner().invoke(cli.app, [*words, option, ""])
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr == f"adpa: {option} '': an empty value; write one, or leave the option out\n"

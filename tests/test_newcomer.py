"""The newcomer's path: README's commands, typed as they stand there, on small models and a few pairs."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import Models, Row, write_program

from adpa.data.cache.responses import read_response_sets

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text().partition("## The four commands")[2].partition("\n## ")[0]
# The four commands, and the way from a table to a chat.
COMMANDS, FROM_CSV = (
    re.findall(r"^adpa .*$", block.replace("\\\n", " "), re.MULTILINE)
    for block in re.findall(r"```\n(.*?)```", SECTION, re.DOTALL)
)
(PROGRAM,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api/commands.md").read_text(), re.DOTALL)


@pytest.fixture
def folder(models: Models, preference_rows: list[Row], tmp_path: Path) -> Path:
    """A folder with T, R, S and prefs.jsonl, as README calls them."""
    for name, model in (("T", models.teacher), ("R", models.reference), ("S", models.student)):
        (tmp_path / name).symlink_to(model)
    write_pairs(tmp_path, preference_rows[:8])
    return tmp_path


def write_pairs(folder: Path, rows: list[Row]) -> None:
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(file: Path, rows: list[Row]) -> None:
    """A table of questions with a good and a bad answer, as a spreadsheet saves it."""
    with file.open("w", newline="") as text:
        table = csv.writer(text)
        table.writerow(["question", "good", "bad"])
        texts = ([row[name][-1]["content"] for name in ("prompt", "chosen", "rejected")] for row in rows)
        table.writerows(texts)


def type_in(folder: Path, command: str) -> str:
    """What a shell in the folder answers; the command must succeed."""
    program = write_program(folder / "bin")
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_four_commands_work_as_they_stand_and_again_when_the_data_has_grown(
    folder: Path, preference_rows: list[Row]
) -> None:
    assert [command.split()[1] for command in COMMANDS] == ["precompute", "distill", "precompute", "distill"]
    for command in COMMANDS:
        type_in(folder, command)
    assert json.loads((folder / "runs/adpa-plus/adpa.json").read_text())["examples"] == 8

    write_pairs(folder, preference_rows[:12])
    (folder / "runs").rename(folder / "earlier")
    said = [type_in(folder, command) for command in COMMANDS]
    for name, place in (("dckd", 1), ("adpa-plus", 3)):
        assert json.loads((folder / "runs" / name / "adpa.json").read_text())["examples"] == 12
        assert "newest" in said[place]
    names = [one.info.name for one in read_response_sets(folder / "CACHE")]
    assert sorted(names) == ["chosen"] * 2 + ["rejected"] * 2 + ["sampled"] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_table_of_questions_becomes_a_student_to_chat_with(folder: Path, preference_rows: list[Row]) -> None:
    write_table(folder / "pairs.csv", preference_rows[:16])
    write_table(folder / "heldout.csv", preference_rows[16:20])
    score, train, compare = FROM_CSV
    type_in(folder, score)
    trained = type_in(folder, train)
    assert "chat runs/dckd" in trained or "vllm chat" in trained
    record = json.loads((folder / "runs/dckd/adpa.json").read_text())
    assert record["examples"] + record["validation_examples"] == 16
    compared = type_in(folder, f"{compare} --max-new-tokens 6")
    assert "Prompt 1: " in compared
    assert "win rate" in compared
    assert "dckd" in type_in(folder, "adpa runs runs")


@pytest.mark.slow
def test_the_python_program_works_as_it_stands(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs/dckd/adpa.json").read_text())["objective"] == "dckd"


@pytest.mark.slow
def test_the_commands_that_readme_mentions_beside_them_work(folder: Path) -> None:
    type_in(folder, COMMANDS[0])
    assert "Hours:" in type_in(folder, f"{COMMANDS[0]} --dry-run --probe 64")
    assert "top-50 mass" in type_in(folder, "adpa inspect CACHE")
    assert "no fault" in type_in(folder, "adpa cache verify CACHE")
    for name in {*re.findall(r"`adpa ([a-z]+)", SECTION)}:
        assert "Usage" in type_in(folder, f"adpa {name} --help")

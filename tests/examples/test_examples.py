"""The examples run as their first lines say, on tiny models; only the answers of a student are shorter."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import Models, WriteRows, write_program
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import adpa
from adpa import list_runs
from adpa.data.cache.responses import read_response_sets
from adpa.lab.environment import Environment, preference_row
from adpa.lab.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
OPTION_FILES: dict[str, Callable[..., Any]] = {
    "precompute.yaml": adpa.precompute,
    "distill.yaml": adpa.distill,
    "evaluate.yaml": adpa.evaluate,
}
RECIPE: dict[str, Callable[..., Any]] = {
    "recipes/paper/precompute.yaml": adpa.precompute,
    "recipes/paper/dckd.yaml": adpa.distill,
    "recipes/paper/adpa.yaml": adpa.distill,
    "recipes/paper/evaluate.yaml": adpa.evaluate,
}
ANSWERS = ("precompute.yaml", "evaluate.yaml")  # have the length of a student's answers
SHORT_ANSWERS = {"max-new-tokens": 6}


@dataclass
class Examples:
    """Runs examples from the root of the repository.

    Attributes:
        environment: what the examples see, such as the models, the data and where the results go.
        output: the folder of the trained students.
    """

    environment: dict[str, str]
    output: Path

    def run(self, example: str, *arguments: object, check: bool = True, **variables: object) -> str:
        """Runs an example with more environment variables; returns its output and its errors."""
        interpreter = "bash" if example.endswith(".sh") else sys.executable
        done = subprocess.run(
            [interpreter, f"examples/{example}", *map(str, arguments)],
            cwd=ROOT,
            env=self.environment | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == check, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tiny random models with the laboratory's tokenizer, which loads in no time."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"number-{number}" for number in range(30)])  # the examples keep 50 ids of each token
    directories = [tmp_path_factory.mktemp(f"model-{seed}") for seed in range(4)]
    for seed, directory in enumerate(directories):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return Models(*directories)


@pytest.fixture
def examples(models: Models, write_rows: WriteRows, tmp_path: Path) -> Examples:
    """The examples with tiny models, eight pairs and short answers, and with this tree's ``adpa`` as the command."""
    rows = [preference_row(pair) for pair in Environment().preference_pairs(12, seed=0)]
    program = write_program(tmp_path / "bin")
    options = tmp_path / "options"
    options.mkdir()
    for file in (EXAMPLES / name for name in [*OPTION_FILES, *RECIPE]):
        settings = yaml.safe_load(file.read_text()) | (SHORT_ANSWERS if file.name in ANSWERS else {})
        copy = options / file.relative_to(EXAMPLES)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(settings))
    output = tmp_path / "runs"
    environment = {
        "BASE": str(models.student),
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "TEACHER": str(models.teacher),
        "REFERENCE": str(models.reference),
        "STUDENT": str(models.student),
        "DATA": str(write_rows(rows[:8])),
        "HELDOUT": str(write_rows(rows[8:], "heldout.jsonl")),
        "CACHE": str(tmp_path / "cache"),
        "OUTPUT": str(output),
        "OPTIONS": str(options),
    }
    return Examples(dict(os.environ) | environment, output)


def objective(run: Path) -> str:
    """The objective that a finished run was trained with."""
    record = json.loads((run / "adpa.json").read_text())
    assert record["steps"] == 3, "one step for each pass over the eight pairs"
    return str(record["objective"])


@pytest.mark.slow
def test_the_four_commands_end_in_a_student_and_its_evaluation(examples: Examples) -> None:
    examples.run("four_commands.sh")
    assert [objective(examples.output / name) for name in ("dckd", "adpa-plus")] == ["dckd", "adpa"]
    assert json.loads((examples.output / "evaluation.json").read_text())["prompts"] == 4


@pytest.mark.slow
def test_the_workflow_from_python_reports_every_step(examples: Examples) -> None:
    variables = examples.environment
    names = ("teacher", "reference", "student", "data", "heldout", "cache", "output")
    options = [f"--{name}={variables[name.upper()]}" for name in names]
    said = examples.run("from_python.py", *options, "--max-new-tokens=6")
    assert "scored 16 responses" in said
    assert "sampled 8 answers" in said
    assert f"win rate against {variables['STUDENT']}: " in said
    assert json.loads((examples.output / "evaluation.json").read_text())["prompts"] == 4
    assert "./none: no such directory" in examples.run("from_python.py", *options, "--teacher=./none", check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_of_the_paper_trains_a_teacher_pair_and_a_student(examples: Examples, models: Models) -> None:
    examples.run("recipes/paper.sh", OPTIONS=Path(examples.environment["OPTIONS"]) / "recipes/paper")
    output = examples.output
    weights = [(one / "model.safetensors").read_bytes() for one in (models.student, output / "reference")]
    weights.append((output / "teacher/model.safetensors").read_bytes())
    assert len(set(weights)) == 3
    assert AutoTokenizer.from_pretrained(output / "teacher").chat_template
    dckd, plus = (json.loads((output / name / "adpa.json").read_text()) for name in ("dckd", "adpa-plus"))
    assert dckd["terms"] == {
        "chosen": {"nll": 1, "kl": 0.1, "advantage": 0},
        "rejected": {"nll": 0, "kl": 0.1, "advantage": 0},
    }
    assert plus["terms"]["sampled"]["advantage"] == 1.6
    assert plus["plausibility"] == 0
    for record in (dckd, plus):
        assert (record["training"]["learning_rate"], record["training"]["batch_size"]) == (5e-7, 128)
    assert json.loads((output / "evaluation.json").read_text())["prompts"] == 4


@pytest.mark.slow
def test_a_slurm_array_shares_stage_one_and_one_job_trains(examples: Examples) -> None:
    examples.run("slurm_array.sh", N=2, SLURM_ARRAY_TASK_ID=1)
    unfinished = examples.run("slurm_array.sh", N=2, check=False)
    assert "sampled" in unfinished.splitlines()[-1]
    examples.run("slurm_array.sh", N=2, SLURM_ARRAY_TASK_ID=2)
    examples.run("slurm_array.sh", N=2)
    assert objective(examples.output) == "adpa"


@pytest.mark.slow
def test_a_team_shares_a_cache_in_an_object_store(examples: Examples, bucket: str) -> None:
    store = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "ADPA_"))}
    examples.environment |= store | {"CACHE": f"{bucket}/team/cache"}
    examples.run("team_cache.sh", "score")
    examples.run("team_cache.sh", "train")
    assert objective(examples.output) == "dckd"
    assert "rejected" in examples.run("team_cache.sh", "check")
    assert "usage: " in examples.run("team_cache.sh", check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_several_students_of_one_cache_are_compared_in_a_table(examples: Examples, models: Models) -> None:
    students = (models.student, models.other_student)
    said = examples.run("several_students.sh", STUDENTS=" ".join(map(str, students)), GAMMAS="0.5")
    expected = sorted(f"{student.name}/{training}" for student in students for training in ("sft", "adpa-0.5"))
    runs = list_runs(Path(examples.environment["OUTPUT"])).runs
    assert [(run.path, run.steps, len(run.evaluations)) for run in runs] == [(path, 3, 1) for path in expected]
    assert said.rstrip().endswith("4 finished")
    (chosen,) = read_response_sets(Path(examples.environment["CACHE"]))
    assert chosen.info.name == "chosen", "no student was asked"


@pytest.mark.parametrize("name", OPTION_FILES | RECIPE)
def test_every_name_in_an_option_file_is_an_option_of_its_command(name: str) -> None:
    names = {key.replace("-", "_") for key in yaml.safe_load((EXAMPLES / name).read_text())}
    assert names <= inspect.signature((OPTION_FILES | RECIPE)[name]).parameters.keys()


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.sh")), ids=lambda script: script.name)
def test_a_script_can_be_parsed(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, str(script)], check=True)


def test_the_list_of_examples_names_every_file() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    files = [path for path in EXAMPLES.rglob("*") if path.is_file() and path.name != "README.md"]
    names = {str(path.parent.relative_to(EXAMPLES) if path.parent != EXAMPLES else path.name) for path in files}
    assert [name for name in names if f"({name}" not in listed] == []

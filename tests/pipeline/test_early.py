"""Mistakes in names and values that need no model to be seen: one whole line each, before torch is imported."""

import os
import shutil
from pathlib import Path

import pytest
from tests.conftest import Models, Row, WriteRows
from tests.test_help import run_light

FROZEN = Path(__file__).parents[1] / "data" / "cache" / "frozen" / "2"
PRECOMPUTE = "precompute --teacher models/teacher --data prefs.jsonl --cache c"
SAMPLE = f"{PRECOMPUTE} --student models/student"
EVALUATE = (
    "evaluate --student models/student --baseline models/base --teacher models/teacher "
    "--reference models/reference --data prefs.jsonl"
)
DISTILL = "distill --objective dckd --student models/student --cache cache --output out"
CHECKPOINT = "expected a Hugging Face checkpoint directory"
HUB_NAME = (
    "no such directory, and no name that the Hub can have (org/name[@revision]); check the name of the checkpoint"
)
OFFLINE = "HF_HUB_OFFLINE keeps adpa from asking the Hub"
DEVICE = "expected auto, cpu, cuda, or cuda:1 for one of several GPUs"
ENDING = "expected .parquet, or none for a directory; name rows.parquet or rows"
OWN_DIRECTORY = "name a directory of its own for the cache"
LONG = "x" * 300

VALUES = {
    f"{SAMPLE} --temperature nan": "--temperature nan; expected 0 or more, finite",
    f"{SAMPLE} --temperature inf": "--temperature inf; expected 0 or more, finite",
    f"{EVALUATE} --temperature -0.5": "--temperature -0.5; expected 0 or more",
    f"{SAMPLE} --temperature 1e-9": "--temperature 1e-09; expected at least 1e-06, or 0, which is greedy",
    f"{SAMPLE} --sampling-top-p nan": "--sampling-top-p nan; expected more than 0 and at most 1",
    f"{EVALUATE} --sampling-top-p inf": "--sampling-top-p inf; expected more than 0 and at most 1",
    f"{PRECOMPUTE} --top-p nan": "--top-p nan; expected more than 0 and at most 1",
    f"{PRECOMPUTE} --gpu-memory-utilization 90": "--gpu-memory-utilization 90; expected more than 0 and at most 1",
    f"{EVALUATE} --gpu-memory-utilization nan": "--gpu-memory-utilization nan; expected more than 0 and at most 1",
    f"{SAMPLE} --seed -1": "--seed -1; expected a whole number from 0 to 2^63 − 1",
    f"{EVALUATE} --seed -7": "--seed -7; expected a whole number from 0 to 2^63 − 1",
    f"{SAMPLE} --seed {2**63}": f"--seed {2**63}; expected a whole number from 0 to 2^63 − 1",
    "lab --output o --seed -1": "--seed -1; expected a whole number from 0 to 2^63 − 1",
    f"{PRECOMPUTE} --top-k {2**31}": f"--top-k {2**31}; expected at most {2**31 - 1}",
    f"{PRECOMPUTE} --max-model-len -1": "--max-model-len -1; expected at least 1",
    f"{PRECOMPUTE} --batch-tokens -1": "--batch-tokens -1; expected at least 1",
    f"{EVALUATE} --tensor-parallel -2": "--tensor-parallel -2; expected at least 1",
    f"{PRECOMPUTE} --dry-run --probe 0": "--probe 0; expected at least 1",
    f"{PRECOMPUTE} --device gpu": f"--device gpu; {DEVICE}",
    f"{EVALUATE} --device cuda:x": f"--device cuda:x; {DEVICE}",
    f"{PRECOMPUTE} --device meta": f"--device meta; {DEVICE}",
    f"{PRECOMPUTE} --executor ray --workers -1": "--workers -1; expected at least 1",
    f"{PRECOMPUTE} --executor ray --workers 2 --ray-address head": "--ray-address head; expected auto or host:port; "
    "write it as node1:6379",
    f"{PRECOMPUTE} --executor ray --workers 2 --ray-address h:99999": "--ray-address h:99999; expected auto or "
    "host:port; write it as node1:6379",
    f"{PRECOMPUTE} --part 0/2": "--part 0/2; expected i/n with i from 1 to n, such as 1/4",
    f"{PRECOMPUTE} --part two": "--part two; expected i/n with i from 1 to n, such as 1/4",
    f"{PRECOMPUTE} --responses chosn": "--responses chosn: found 'chosn'; expected chosen, rejected, sampled; "
    "did you mean chosen?",
    f"{PRECOMPUTE} --engine hf --tensor-parallel 2": "--tensor-parallel is for vLLM; the engine is hf (as asked); "
    "leave it out",
    "inspect cache --count -3": "--count -3; expected at least 1",
}
MODELS = {
    f"{PRECOMPUTE} --teacher models/techer": f"--teacher models/techer: no such directory, and {OFFLINE}; "
    "did you mean models/teacher?",
    f"{PRECOMPUTE} --reference ./models/refrence": "--reference ./models/refrence: no such directory; "
    "did you mean models/reference?",
    f"{SAMPLE} --student /none": "--student /none: no such directory; check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher a/b/c": f"--teacher a/b/c: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher 'a b'": f"--teacher a b: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher org/": f"--teacher org/: {HUB_NAME}",
    f"{PRECOMPUTE} --teacher org/name": f"--teacher org/name: no such directory, and {OFFLINE}; "
    "check the name of the checkpoint, or unset HF_HUB_OFFLINE",
    f"{PRECOMPUTE} --teacher org/name@": "--teacher org/name@: no such directory; found no revision after @; "
    "name one, or leave @ out",
    f"{PRECOMPUTE} --teacher https://huggingface.co/org/name": "--teacher https://huggingface.co/org/name: no such "
    "directory; a model of the Hub is named org/name[@revision]; did you mean org/name?",
    f"{PRECOMPUTE} --teacher prefs.jsonl": f"--teacher prefs.jsonl: it is a file; {CHECKPOINT}; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher models/teacher/config.json": f"--teacher models/teacher/config.json: it is a file; "
    f"{CHECKPOINT}; did you mean models/teacher?",
    f"{PRECOMPUTE} --teacher empty": f"--teacher empty: found no config.json; {CHECKPOINT}; check the path",
    f"{PRECOMPUTE} --teacher cache": f"--teacher cache: found no config.json, but a cache; {CHECKPOINT}; "
    "check the path",
    f"{PRECOMPUTE} --teacher run": f"--teacher run: found no config.json; {CHECKPOINT}; "
    "did you mean run/checkpoint-20?",
    f"{PRECOMPUTE} --teacher models": f"--teacher models: found no config.json; {CHECKPOINT}; "
    "did you mean models/base?",
    f"{PRECOMPUTE} --teacher run/checkpoint-20": "--teacher run/checkpoint-20: found no weights; expected one of "
    "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json",
    f"{PRECOMPUTE} --teacher loop": "--teacher loop: cannot be read: Too many levels of symbolic links; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --teacher {LONG}": f"--teacher {LONG}: cannot be read: File name too long; "
    "check the name of the checkpoint",
    f"{PRECOMPUTE} --reference ./models/../models/teacher": "--reference ./models/../models/teacher: it has the "
    "teacher's weights, so that every advantage would be 0; name the model before preference training",
    f"{EVALUATE} --baseline models/student": "--baseline models/student: it has the weights of --student "
    "models/student, so that there is nothing to compare; name the model before training, or another one",
    f"{EVALUATE} --baseline ./nowhere": "--baseline ./nowhere: no such directory; check the name of the checkpoint",
    f"{EVALUATE} --reference models/teacher": "--reference models/teacher: it has the teacher's weights, so that "
    "every advantage would be 0; name the model before preference training",
    f"{DISTILL} --student models/studnet": f"--student models/studnet: no such directory, and {OFFLINE}; "
    "did you mean models/student?",
    f"{DISTILL} --student cache": f"--student cache: found no config.json, but a cache; {CHECKPOINT}; check the path",
}
DATA = {
    f"{PRECOMPUTE} --data pref.jsonl": "pref.jsonl: no such file or directory; did you mean prefs.jsonl?",
    f"{EVALUATE} --data ./no.parquet": "./no.parquet: no such file or directory; check --data",
    f"{PRECOMPUTE} --data org/pairs": f"org/pairs: no such file or directory, and {OFFLINE}; "
    "check --data, or unset HF_HUB_OFFLINE",
    f"{PRECOMPUTE} --data 'my pairs'": "my pairs: no such file or directory, and no name that the Hub can have; "
    "check --data",
    f"{PRECOMPUTE} --data models/teacher": "models/teacher: it is a model; expected preference pairs; check --data",
    f"{EVALUATE} --data cache": "cache: it is a cache; expected preference pairs; check --data",
    f"{PRECOMPUTE} --data /dev/null": "/dev/null: a device or a pipe; expected a file, which can be read twice; "
    "write it to a file",
    f"{PRECOMPUTE} --data none.jsonl": "none.jsonl: found no rows; expected at least one preference pair; check --data",
    f"{PRECOMPUTE} --data loop": "--data loop: Too many levels of symbolic links; name another place",
    f"{PRECOMPUTE} --data {LONG}": f"--data {LONG}: File name too long; name another place",
}
CACHES = {
    "inspect cach": "cach: no cache there; did you mean cache?",
    "inspect cache/responses": "cache/responses: no cache there; did you mean cache?",
    "cache ls prefs.jsonl": "prefs.jsonl: it is a file; expected the directory of a cache; check the path",
    "cache gc models/teacher": "models/teacher: no cache there, but a model; make it with adpa precompute, "
    "or check the path",
    "cache merge cache empty": "empty: no cache there; make it with adpa precompute, or check the path",
    f"{DISTILL} --cache run": "run: no cache there; make it with adpa precompute, or check the path",
    f"{DISTILL} --cache models/teacher": "models/teacher: no cache there, but a model; make it with adpa precompute, "
    "or check the path",
    f"{DISTILL} --cache few": "few: the cache has no rejected responses; run adpa precompute --responses rejected",
    f"{DISTILL} --objective adpa --cache few": "few: the cache has no sampled responses; run adpa precompute "
    "with --student",
    f"{DISTILL} --objective kd --cache few": "few: found no scorings; make one with adpa precompute",
    f"{DISTILL} --objective adpa --scoring 227c": "cache: no scoring has the signals that are needed: scoring "
    "227c2b4372d065c5 has no reference, hence no advantages; run adpa precompute with these responses, and with "
    "--reference for advantages",
}
OUTPUTS = {
    f"{PRECOMPUTE} --cache prefs.jsonl": "--cache prefs.jsonl: prefs.jsonl is not a directory; name another directory",
    f"{PRECOMPUTE} --cache models/teacher": f"--cache models/teacher: it is a model; {OWN_DIRECTORY}",
    f"{EVALUATE} --cache loop": "--cache loop: Too many levels of symbolic links; name another place",
    f"{EVALUATE} --cache {LONG}": f"--cache {LONG}: File name too long; name another place",
    f"{PRECOMPUTE} --cache broken": "--cache broken: broken is a broken link; name another directory",
    f"{PRECOMPUTE} --cache /proc/c": "--cache /proc/c: /proc cannot be written; name another directory",
    f"{DISTILL} --output cache": "--output cache: lies in the cache cache; name a place outside of it",
    f"{DISTILL} --output cache/../cache/out": "--output cache/../cache/out: lies in the cache cache; "
    "name a place outside of it",
    f"{DISTILL} --output prefs.jsonl": "--output prefs.jsonl: prefs.jsonl is not a directory; name another directory",
    f"{DISTILL} --output run": "--output run: not empty, found checkpoint-10; name another directory, or resume with "
    "--resume-from-checkpoint last",
    "inspect cache --html cache/page.html": "--html cache/page.html: lies in the cache cache; "
    "name a place outside of it",
    "inspect cache --html no/page.html": "--html no/page.html: cannot be written there; name a file in an existing "
    "directory",
    f"inspect cache --html {LONG}": f"--html {LONG}: File name too long; name another place",
    "cache export cache --output rows.csv": f"--output rows.csv: found the ending .csv; {ENDING}",
    "cache export cache --output rows.jsonl": f"--output rows.jsonl: found the ending .jsonl; {ENDING}",
    "cache export cache --output rows.parquet.gz": f"--output rows.parquet.gz: found the ending .gz; {ENDING}",
    "cache export cache --output rows.ARROW": f"--output rows.ARROW: found the ending .ARROW; {ENDING}",
    "cache export cache --output cache/rows": "--output cache/rows: lies in the cache cache; "
    "name a place outside of it",
    "lab --output prefs.jsonl": "--output prefs.jsonl: prefs.jsonl is not a directory; name another directory",
    "lab --output cache": "--output cache: a cache, and no study; name another directory",
    "lab --output run": "--output run: not empty, and no study; name another directory",
}


@pytest.fixture
def desk(tmp_path: Path, models: Models, preference_rows: list[Row], write_rows: WriteRows) -> Path:
    """A working directory with models, data and a cache, and a few things that are none of them."""
    write_rows(preference_rows[:3])
    (tmp_path / "models").mkdir()
    named = {"teacher": models.teacher, "reference": models.reference, "student": models.student}
    for name, directory in {**named, "base": models.other_student}.items():
        (tmp_path / "models" / name).symlink_to(directory)
    shutil.copytree(FROZEN, tmp_path / "cache")
    (tmp_path / "few" / "responses").mkdir(parents=True)
    for file in (FROZEN / "responses").glob("chosen-*"):
        shutil.copy(file, tmp_path / "few" / "responses")
    for step in (10, 20):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
        shutil.copy(models.student / "config.json", tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("gone")
    return tmp_path


@pytest.mark.parametrize(
    "mistakes", [VALUES, MODELS, DATA, CACHES, OUTPUTS], ids=["values", "models", "data", "caches", "outputs"]
)
def test_a_mistake_is_one_whole_line_before_torch_is_imported(
    mistakes: dict[str, str], desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = run_light(mistakes, desk)
    assert dict(zip(mistakes, said, strict=True)) == {command: f"adpa: {line}\n" for command, line in mistakes.items()}
    assert not os.path.exists(desk / "c")


def test_the_hub_that_does_not_answer_is_one_line_at_once(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    commands = [f"{PRECOMPUTE} --teacher org/name", f"{EVALUATE} --baseline org/name@v1", f"{PRECOMPUTE} --data org/x"]
    network = "the Hub cannot be reached; check"
    assert run_light(commands, desk) == [
        f"adpa: --teacher org/name: no such directory, and {network} the name of the checkpoint, and the network\n",
        f"adpa: --baseline org/name@v1: no such directory, and {network} the name of the checkpoint, and the network\n",
        f"adpa: org/x: no such file or directory, and {network} --data, and the network\n",
    ]

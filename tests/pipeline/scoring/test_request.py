"""What a caller of the functions gets wrong: empty names, values of another type, names that no choice has."""

from pathlib import Path
from typing import Any

import pytest

from adpa import distill, evaluate, inspect_cache, precompute
from adpa.errors import OptionError

EMPTY = "an empty value; write one, or leave the option out"


def refused(stage: Any, **options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        stage(**options)
    return str(caught.value)


def asked(tmp_path: Path, **options: Any) -> str:
    return refused(precompute, **{"teacher": "t", "data": "d", "cache": tmp_path / "cache"} | options)


@pytest.mark.parametrize("option", ["teacher", "reference", "student", "data", "split", "responses", "quantization"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(option: str, empty: str, tmp_path: Path) -> None:
    assert asked(tmp_path, **{option: empty}) == f"--{option} {empty!r}: {EMPTY}"


@pytest.mark.parametrize("option", ["student", "baseline", "teacher", "reference", "data", "split"])
def test_an_empty_name_is_not_evaluated(option: str) -> None:
    names = {"student": "s", "baseline": "b", "teacher": "t", "reference": "r", "data": "d"}
    assert refused(evaluate, **names | {option: ""}) == f"--{option} '': {EMPTY}"


@pytest.mark.parametrize("option", ["response_set", "scoring", "example"])
def test_an_empty_name_is_not_inspected(option: str, tmp_path: Path) -> None:
    assert refused(inspect_cache, cache=tmp_path, **{option: ""}) == f"--{option.replace('_', '-')} '': {EMPTY}"


@pytest.mark.parametrize("option", ["student", "scoring", "resume_from_checkpoint"])
def test_an_empty_name_is_not_trained(option: str, tmp_path: Path) -> None:
    names: dict[str, Any] = {"objective": "sft", "student": "s", "cache": tmp_path, "output": tmp_path / "out"}
    assert refused(distill, **names | {option: ""}) == f"--{option.replace('_', '-')} '': {EMPTY}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2.5}, "--top-k 2.5; expected a whole number"),
        ({"top_k": True}, "--top-k True; expected a number"),
        ({"max_length": "2048"}, "--max-length '2048'; expected a number"),
        ({"top_p": "0.9"}, "--top-p '0.9'; expected a number"),
        ({"temperature": None}, "--temperature None; expected a number"),
        ({"seed": 1.0}, "--seed 1.0; expected a whole number"),
        ({"engine": "vlm"}, "--engine 'vlm'; expected one of auto, hf, vllm; did you mean vllm?"),
        ({"dtype": "bf16"}, "--dtype 'bf16'; expected one of auto, float32, bfloat16, float16; did you mean bfloat16?"),
        ({"head_dtype": "half"}, "--head-dtype 'half'; expected one of auto, float32, model"),
        ({"executor": "rey"}, "--executor 'rey'; expected one of here, ray; did you mean ray?"),
        ({"device": ""}, "--device ''; expected auto, cpu, cuda, or cuda:1 for one of several GPUs"),
    ],
)
def test_a_value_of_another_type_or_name_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert asked(tmp_path, **options) == message
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", ["a\0b", "x" * 256, "\ud800"])
def test_a_path_that_cannot_exist_is_one_line_that_can_be_printed(place: str, tmp_path: Path) -> None:
    message = asked(tmp_path, cache=tmp_path / place)
    assert message.startswith("--cache ")
    assert message.endswith("; name another place")
    assert message.isprintable()

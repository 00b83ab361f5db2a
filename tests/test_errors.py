"""Errors cross process boundaries and say what to do."""

import pickle

import pytest

from adpa import errors

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.AdpaError)]


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_survives_pickling(error_class: type[errors.AdpaError]) -> None:
    error = error_class("f.jsonl line 3: found x; expected y", "mend the file")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == str(error) == "f.jsonl line 3: found x; expected y; mend the file"


def test_the_users_mistakes_exit_with_2_and_the_machines_with_1() -> None:
    codes = {error_class.__name__: error_class.exit_code for error_class in CLASSES}
    assert [codes.pop(name) for name in ("DamagedFileError", "EngineError", "RankError")] == [1, 1, 1]
    assert set(codes.values()) == {2}


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("warmup_ratoi", ["warmup_ratio", "seed"], "warmup_ratio"),
        ("adam_bta1", ["adam_beta1", "adam_beta2"], "adam_beta1"),
        ("adamm", ["adafactor", "adalomo", "adamw_torch"], "adamw_torch"),
        ("cosin", ["cosine_with_min_lr", "cosine", "linear"], "cosine"),
    ],
)
def test_the_nearest_known_name_is_asked_for(name: str, known: list[str], meant: str) -> None:
    assert errors.did_you_mean(name, known) == f"did you mean {meant}?"


@pytest.mark.parametrize("name", ["xyz", ""])
def test_without_a_near_name_nothing_is_asked(name: str) -> None:
    assert errors.did_you_mean(name, ["warmup_ratio", "seed"]) == errors.did_you_mean(name, []) == ""


@pytest.mark.parametrize(("said", "line"), [("", ""), ("broken", "broken"), ("\n no header \nadvice\n", "no header ")])
def test_of_another_packages_error_the_first_line_is_told(said: str, line: str) -> None:
    assert errors.first_line(ValueError(said)) == line

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


def test_the_nearest_known_name_is_asked_for() -> None:
    assert errors.did_you_mean("warmup_ratoi", ["warmup_ratio", "seed"]) == "did you mean warmup_ratio?"
    assert errors.did_you_mean("xyz", ["warmup_ratio", "seed"]) == ""

"""Options in YAML: names as they are written and none twice, numbers as people write them."""

from pathlib import Path
from typing import Any

import pytest

from adpa.errors import OptionError
from adpa.yaml_options import as_number, read_config, read_options


def read(text: str | bytes, tmp_path: Path) -> Any:
    path = tmp_path / "options.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_options("--config", path)


def test_names_are_as_they_are_written_and_values_as_yaml_reads_them(tmp_path: Path) -> None:
    text = "on: on\nyes: 5\n010: {no: 1.0e-3, ~: ~}\n'quoted': [off, off]\n"
    assert read(text, tmp_path) == {
        "on": True,
        "yes": 5,
        "010": {"no": 1e-3, "~": None},
        "quoted": [False, False],
    }


def test_what_a_mapping_takes_from_another_is_not_there_twice(tmp_path: Path) -> None:
    text = "a: {b: {c: &c {<<: &base {on: 1, x: 1}, x: 2}}}\nd: {<<: *c, x: 3}\ne: {<<: *base, <<: *c}\n"
    read_as = read(text, tmp_path)
    assert read_as["a"]["b"]["c"] == {"on": 1, "x": 2}
    assert read_as["d"] == {"on": 1, "x": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is there twice; correct the YAML"),
        ("x: {on: 1, 'on': 2}", "'on' is there twice"),
        ("x: [", "line 1: expected the node content"),
        ("[a]: 1", "unhashable key"),
        ("day: 2024-13-01", "month must be in 1..12"),
        (b"\xff", "not a text file; name a YAML file in UTF-8"),
        (b"PK\x00\x01", "not a text file"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_that_names_the_option_and_the_file(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        read(text, tmp_path)
    assert str(caught.value).startswith(f"--config {tmp_path / 'options.yaml'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionError, match=r"--study nowhere.yaml: .*No such file"):
        read_options("--study", Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("value", "number"), [("1e-3", 1e-3), ("7", 7.0), (7, 7), ("seven", "seven"), (True, True), (None, None)]
)
def test_text_that_is_a_number_is_that_number(value: object, number: object) -> None:
    assert as_number(value) == number
    assert type(as_number(value)) is type(number)


@pytest.mark.parametrize("text", ["0123456701234567", "0270", "00"])
def test_digits_after_a_zero_are_text_as_in_an_id(text: str, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"scoring: {text}\nworkers: 0\nseed: 12\n")
    assert read_options("--config", path) == {"scoring": text, "workers": 0, "seed": 12}


def test_the_numbers_of_a_commands_options_are_the_text_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "seed: 1_0\nrate: 1.0e-3\nday: 2024-13-01\non: on\nlist: [0x1, 2, {a: 3}]\nobject: {number: 4}\n"
    )
    assert read_config("--config", tmp_path / "run.yaml") == {
        "seed": "1_0",
        "rate": "1.0e-3",
        "day": "2024-13-01",
        "on": True,
        "list": ["0x1", "2", {"a": 3}],
        "object": {"number": 4},
    }

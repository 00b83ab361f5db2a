"""What lies at a path is told by its files; a question names the nearest place of the wanted kind."""

from pathlib import Path

import pytest
from upath import UPath

from adpa.data.cache.kinds import did_you_mean_path, kind

KINDS = {
    "a cache": [("cache.json",), ("responses/", "scorings/")],
    "a model": [("config.json", "model.safetensors"), ("config.json", "pytorch_model.bin"), ("adapter_config.json",)],
    "a data set": [("dataset_dict.json",), ("state.json", "data-00000-of-00001.arrow")],
    "a directory": [(), ("config.json",), ("state.json",), ("responses/",), ("model.safetensors",)],
}


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        if name.endswith("/"):
            (folder / name).mkdir()
        else:
            (folder / name).touch()
    return folder


@pytest.mark.parametrize(("what", "names"), [(what, names) for what, forms in KINDS.items() for names in forms])
def test_a_directory_is_what_its_files_say(what: str, names: tuple[str, ...], tmp_path: Path) -> None:
    assert kind(make(tmp_path / "it", *names)) == what


def test_a_file_is_a_file_and_nothing_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert kind(tmp_path / "config.json") == "a file"
    for nothing in (tmp_path / "gone", tmp_path / "config.json" / "x", tmp_path / "a\0b", UPath("s3://bucket/cache")):
        assert kind(nothing) == ""


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("runs/teachre", "runs/teacher"),  # beside
        ("runs", "runs/teacher"),  # in it
        ("runs/teacher/config.json", "runs/teacher"),  # above
        ("runs/mistral", ""),
        ("elsewhere/teacher", ""),
    ],
)
def test_the_nearest_place_is_asked_for(
    place: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "runs" / "teacher", "config.json", "model.safetensors")
    make(tmp_path / "runs" / "teachers")
    monkeypatch.chdir(tmp_path)
    assert did_you_mean_path(Path(place), "a model") == (meant and f"did you mean {meant}?")

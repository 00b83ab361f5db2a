"""What lies at a path that a user named, for errors: a file, a model, a data set, a cache."""

import os
from difflib import get_close_matches
from pathlib import Path

from adpa.data.cache.locations import Location, is_local

WEIGHTS = (".safetensors", ".bin")


def kind(place: Location) -> str:
    """What lies at a path: "a file", "a model", "a data set", "a cache", "a directory"; empty if nothing does."""
    if not is_local(place) or not os.path.exists(place):
        return ""
    if not os.path.isdir(place):
        return "a file"
    names = _names(place)
    if "cache.json" in names or names >= {"responses", "scorings"}:
        return "a cache"
    if "adapter_config.json" in names or ("config.json" in names and any(name.endswith(WEIGHTS) for name in names)):
        return "a model"
    if "dataset_dict.json" in names or ("state.json" in names and any(name.endswith(".arrow") for name in names)):
        return "a data set"
    return "a directory"


def did_you_mean_path(place: Location, wanted: str) -> str:
    """A question for the fix of an error: the nearest place of the wanted kind in, above or beside a path; or empty."""
    if not is_local(place):
        return ""
    inside = [one for one in _entries(place) if kind(one) == wanted]
    beside = {one.name: one for one in _entries(place.parent) if one != place and kind(one) == wanted}
    close = [beside[name] for name in get_close_matches(place.name, list(beside), n=1)]
    above = [place.parent] if place.name and kind(place.parent) == wanted else []
    return next((f"did you mean {one}?" for one in (*inside, *above, *close)), "")


def _entries(folder: Path) -> list[Path]:
    return [folder / name for name in sorted(_names(folder)) if not name.startswith(".")]


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):
        return set()

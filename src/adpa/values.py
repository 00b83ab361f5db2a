"""Reads the value of an option, from the command line or from YAML."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from adpa.data.cache.locations import Location, find_location
from adpa.errors import OptionError, did_you_mean, empty_value

NUMBERS = {int: "a whole number", float: "a number"}
LONGEST_SHOWN = 80  # characters of a value in a message


def read_value(label: str, kind: Any, written: Any) -> Any:
    """The value of an option.

    A ``~`` or ``~user`` at the beginning of a place is expanded, as a shell does. The names of a choice may be written
    in any case.

    Args:
        label: the option, for messages: ``--top-k``, or ``--config run.yaml: top-k``.
        kind: ``bool``, ``int``, ``float``, ``str``, ``Path``, ``PathOrName``, ``Location``, ``Mapping`` or a
            ``Literal``.
        written: text, or what a YAML file has.

    Raises:
        OptionError: it is empty, or no such value.
    """
    if isinstance(written, str) and not written.strip():
        raise empty_value(label, written)
    if kind is Mapping and isinstance(written, str | Mapping):
        return _read_object(label, written)
    if not isinstance(written, str):
        if kind is bool and isinstance(written, bool):
            return written
        fix = "put text such as yes, no, on and off in quotes" if isinstance(written, bool) else ""
        raise OptionError(f"{label}: found {_describe(written)}; expected {_expected(kind)}", fix)
    if written.startswith("--"):
        raise OptionError(f"{label} {_short(written)}: an option in the place of a value", f"write a value for {label}")
    if kind in NUMBERS or kind is bool or get_origin(kind) is Literal:
        return _read_choice_or_number(label, kind, written)
    if "\0" in written:
        raise OptionError(f"{label} {_short(repr(written))}: has a null character", "remove it")
    if kind is str:
        return written
    place = written if "://" in written else os.path.expanduser(written)
    if kind == Location:
        return find_location(place)
    return Path(place) if kind is Path else place


def _read_choice_or_number(label: str, kind: Any, written: str) -> Any:
    if kind in NUMBERS:
        try:
            return kind(written)
        except ValueError:
            raise OptionError(f"{label} {_short(written)}; expected {NUMBERS[kind]}") from None
    names = get_args(kind)
    for name in names:
        if name.casefold() == written.strip().casefold():
            return name
    raise OptionError(f"{label} {_short(written)}; expected {_expected(kind)}", did_you_mean(written.casefold(), names))


def _read_object(label: str, written: Any) -> dict[str, Any]:
    """The object that a user wrote as JSON, or as a mapping in YAML."""
    fix = f"write {label} '{{\"name\": value}}'" if label.startswith("--") and " " not in label else "write a mapping"
    try:
        value = json.loads(written) if isinstance(written, str) else written
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise OptionError(f"{label}: {_short(repr(written))} is no JSON", fix) from error
    if not isinstance(value, dict):
        raise OptionError(f"{label}: {_short(repr(written))} is no JSON object", fix)
    return value


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "true or false"
    if kind is Mapping:
        return "a mapping"
    if kind == Location:
        return "a path or a URL"
    return NUMBERS.get(kind) or ("a path" if kind is Path else "text" if kind is str else "a path or a name")


def _describe(written: object) -> str:
    if isinstance(written, bool):
        return "a truth value"
    if isinstance(written, Mapping):
        return "a mapping"
    if isinstance(written, list | tuple):
        return "a list"
    return "no value" if written is None else type(written).__name__


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"

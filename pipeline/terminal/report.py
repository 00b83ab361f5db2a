"""Shows a report in a terminal as a table of its fields."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Column, Table

EXPECTED = "a GPU and vLLM are there"  # why an engine that nobody asked for is no surprise


def show_report(
    title: str, report: Any, leave_out: Collection[str] = (), first: Mapping[str, object] | None = None
) -> Table:
    """A row for each field of a dataclass, except those to leave out and those that say nothing.

    The rows of ``first`` stand before them. A mapping or list takes one line per entry. It says nothing without an
    entry, or with zeros alone.
    """
    table = Table(Column(no_wrap=True), Column(overflow="fold"), title=f"adpa {title}", show_header=False)
    for name, value in {**(first or {}), **dataclasses.asdict(report)}.items():
        if name not in leave_out and not _says_nothing(value):
            table.add_row(name.replace("_", " "), _field_text(value))
    return table


def _says_nothing(value: object) -> bool:
    if isinstance(value, dict):
        return not any(value.values())
    return value is None or value == []


def _field_text(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{str(key).replace('_', ' ')} {_field_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return "\n".join(map(_field_text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def describe_engine(name: str, reason: str) -> str:
    """An engine with those parts of its reason that a user may not expect."""
    return "; ".join([name, *(one for one in reason.split("; ") if one != EXPECTED and not one.endswith("as asked"))])

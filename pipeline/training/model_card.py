"""The model card of a student. Imports no torch."""

from pathlib import Path


def write_card(output: Path) -> None:
    """Writes README.md from adpa.json and evaluations.json."""

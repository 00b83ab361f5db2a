"""JSON files that tests change by hand."""

import json
from collections.abc import Callable
from pathlib import Path


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Rewrites a JSON file after ``edit`` has changed its content in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))

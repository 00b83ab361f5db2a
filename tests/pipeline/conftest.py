"""A cache that the stages filled once from tiny models, for tests that only read it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Models, Row

from adpa import precompute


@dataclass(frozen=True)
class Filled:
    """A cache with chosen, rejected and sampled responses, scored by teacher and reference."""

    cache: Path
    data: Path
    models: Models


@pytest.fixture(scope="session")
def filled(models: Models, preference_rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """Eight pairs, K = 10; the sampled responses are those of ``models.student``, two to a prompt."""
    folder = tmp_path_factory.mktemp("filled")
    data, cache = folder / "prefs.jsonl", folder / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows[:8]))
    common: dict[str, Any] = {
        "teacher": str(models.teacher),
        "reference": str(models.reference),
        "data": str(data),
        "cache": cache,
    }
    precompute(**common, top_k=10)
    precompute(**common, top_k=10, student=str(models.student), samples_per_prompt=2, max_new_tokens=6)
    return Filled(cache, data, models)

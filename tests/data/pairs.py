"""Rows in two forms, and the line with which a row is refused."""

from typing import Any

import pytest
from tests.data.messages import CHOSEN, REJECTED, Row

from adpa.data.preferences import parse_pair
from adpa.errors import RowError


def explicit(prompt: list[Row]) -> Row:
    return {"prompt": prompt, "chosen": [CHOSEN], "rejected": [REJECTED]}


def implicit(prompt: list[Row]) -> Row:
    """As in argilla/dpo-mix-7k."""
    return {"chosen": [*prompt, CHOSEN], "rejected": [*prompt, REJECTED], "dataset": "argilla", "chosen_rating": 5.0}


def refusal(row: Any, reason: str | None = None, rendered: bool = False) -> str:
    """The one line with which the row is refused, under the reason."""
    with pytest.raises(RowError) as caught:
        parse_pair("prefs.jsonl line 2", row, rendered)
    message = str(caught.value)
    assert message.startswith("prefs.jsonl line 2: ")
    assert "\n" not in message
    assert reason in (None, caught.value.reason)
    return message

"""The measures of a model's answers."""

from collections.abc import Iterable

import numpy as np
import pytest

from adpa.data.answers import repetition


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 5, 5], 0.0),
        ([5, 5, 5, 5], 0.0),
        ([5] * 10, 1 - 1 / 7),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 - 4 / 5),
        (range(20), 0.0),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(tokens: Iterable[int], expected: float) -> None:
    assert repetition(np.array([*tokens], dtype=np.int32)) == pytest.approx(expected, abs=1e-15)

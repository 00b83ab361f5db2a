"""Which prompts a share holds out."""

import numpy as np
import pytest

from adpa.data.held_out import held_out, place

PROMPTS = [np.array([number, 7, 11], dtype=np.int32).tobytes() for number in range(10_000)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_about_the_share_of_the_prompts_is_held_out(share: float) -> None:
    expected = share * len(PROMPTS)
    assert sum(held_out(PROMPTS, share)) == pytest.approx(expected, abs=4 * (expected * (1 - share)) ** 0.5)


def test_a_prompt_is_held_out_whatever_else_the_data_has() -> None:
    few, many = PROMPTS[500:600], [*PROMPTS[::-1], *PROMPTS[500:600]]
    assert held_out(many, 0.3)[-100:] == held_out(few, 0.3)


def test_a_larger_share_holds_out_the_same_prompts_and_more() -> None:
    small, large = held_out(PROMPTS, 0.02), held_out(PROMPTS, 0.05)
    assert all(more for one, more in zip(small, large, strict=True) if one)
    assert sum(large) > sum(small)


def test_examples_of_one_prompt_stay_together() -> None:
    once = held_out(PROMPTS[:50], 0.5)
    assert held_out([*PROMPTS[:50], *PROMPTS[:50]], 0.5) == once + once


def test_the_place_of_a_prompt_never_changes() -> None:
    """Of another version of adpa, too: a student may be trained further with it."""
    assert [round(place(prompt), 6) for prompt in PROMPTS[:3]] == [0.966729, 0.932567, 0.392954]

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adpa.data.row_counts import RowCounts
from adpa.data.sequences import TokenIds
from adpa.errors import RowError

PROMPT, OTHER_PROMPT, GOOD, BAD, LONG = (np.array(ids, np.int32) for ids in ([1, 2], [1], [3], [4], [3, 5]))


def count(*pairs: tuple[TokenIds, TokenIds, TokenIds]) -> RowCounts:
    counts = RowCounts()
    for pair in pairs:
        counts.rows += 1
        counts.add_used(str(pair), *pair)
    return counts


def test_a_pair_that_is_met_again_is_a_duplicate_from_the_second_time_on() -> None:
    counts = RowCounts()
    assert [counts.add_used(name, PROMPT, GOOD, BAD) for name in ("a", "b", "a", "a", "b")] == [1, 1, 2, 3, 2]
    assert (counts.used, counts.duplicates) == (5, 3)


def test_equal_responses_are_identical() -> None:
    assert count((PROMPT, GOOD, GOOD), (PROMPT, GOOD, BAD), (PROMPT, GOOD, LONG), (PROMPT, BAD, BAD)).identical == 2


def test_the_same_prompt_with_exchanged_responses_is_a_contradiction() -> None:
    assert count((PROMPT, GOOD, BAD), (PROMPT, BAD, GOOD)).contradicting == 1
    assert count((PROMPT, BAD, GOOD), (PROMPT, GOOD, LONG), (PROMPT, GOOD, BAD)).contradicting == 1
    assert count((PROMPT, GOOD, BAD), (PROMPT, BAD, GOOD), (PROMPT, GOOD, BAD)).contradicting == 2


def test_other_prompts_and_identical_responses_do_not_contradict() -> None:
    assert count((PROMPT, GOOD, BAD), (OTHER_PROMPT, BAD, GOOD)).contradicting == 0
    assert count((PROMPT, GOOD, GOOD), (PROMPT, GOOD, GOOD)).contradicting == 0
    assert count((PROMPT, GOOD, BAD), (PROMPT, GOOD, BAD)).contradicting == 0


RESPONSES = st.integers(0, 3).map(lambda token: np.array([token], np.int32))


@given(st.lists(st.one_of(st.just(None), st.tuples(RESPONSES, RESPONSES, RESPONSES)), max_size=30))
def test_every_row_is_in_use_or_dropped_and_every_one_in_use_new_or_a_duplicate(
    rows: list[tuple[TokenIds, TokenIds, TokenIds] | None],
) -> None:
    counts = RowCounts()
    for number, row in enumerate(rows):
        counts.rows += 1
        if row is None:
            counts.add_invalid(number, RowError("line 1: broken", "", f"reason {number % 3}"))
        else:
            counts.add_used(str(row), *row)
    plain = [tuple(int(ids[0]) for ids in row) for row in rows if row is not None]
    assert counts.rows == counts.used + counts.dropped
    assert counts.dropped == sum(counts.reasons().values())
    assert counts.used == counts.duplicates + len(set(plain))
    assert counts.identical == sum(chosen == rejected for _, chosen, rejected in plain)
    assert counts.contradicting == sum(
        chosen != rejected and (prompt, rejected, chosen) in plain[:number]
        for number, (prompt, chosen, rejected) in enumerate(plain)
    )

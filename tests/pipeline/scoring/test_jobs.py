"""Batches stay within their budget, and their results are written while the next ones are computed."""

from collections.abc import Iterator, Sequence
from threading import Event

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adpa.pipeline.scoring.jobs import make_batches, write_batches

LONG = 10.0  # seconds until a hanging test fails


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_batches_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    items = list(enumerate(lengths))
    batches = make_batches(items, lambda item: item[1], budget)
    assert sorted(item for batch in batches for item in batch) == items
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(length for _, length in batch) <= budget
    longest = [max(length for _, length in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_a_batch_is_closed_only_when_the_next_item_does_not_fit(lengths: list[int], budget: int) -> None:
    batches = make_batches(lengths, int, budget)
    assert all((len(batch) + 1) * max(batch) > budget for batch in batches[:-1])


def numbered(count: int) -> Sequence[Sequence[int]]:
    """``count`` batches of one item."""
    return [[number] for number in range(count)]


def test_every_result_is_written_once_in_order() -> None:
    written: list[str] = []
    write_batches("", [[1, 1], [1], [1, 1, 1]], int, iter("abc"), written.append)
    assert written == ["a", "b", "c"]


def test_without_a_batch_nothing_is_written() -> None:
    write_batches("", [], int, [], lambda _: pytest.fail("written"))


def test_a_result_is_written_while_the_next_one_is_computed() -> None:
    computing_second, written_first = Event(), Event()

    def results() -> Iterator[str]:
        yield "first"
        computing_second.set()
        assert written_first.wait(LONG), "the first result waits for the second"
        yield "second"

    def write(result: str) -> None:
        if result == "first":
            assert computing_second.wait(LONG)
            written_first.set()

    write_batches("", numbered(2), int, results(), write)
    assert written_first.is_set()


def test_the_computation_is_at_most_one_batch_ahead_of_the_writing() -> None:
    computing = [Event() for _ in range(6)]

    def results() -> Iterator[int]:
        for number in range(6):
            computing[number].set()
            yield number

    def write(number: int) -> None:
        if number < 4:
            assert not computing[number + 2].wait(0.05), "two results are in memory beside the one being computed"

    write_batches("", numbered(6), int, results(), write)
    assert computing[5].is_set()


def test_a_failing_write_stops_the_run_with_its_own_error() -> None:
    computed: list[int] = []
    written: list[int] = []

    def results() -> Iterator[int]:
        for number in range(6):
            computed.append(number)
            yield number

    def write(number: int) -> None:
        if number == 1:
            raise OSError("disk full")
        written.append(number)

    with pytest.raises(OSError, match="disk full"):
        write_batches("", numbered(6), int, results(), write)
    assert written == [0]
    assert computed == [0, 1, 2]


def test_the_last_write_may_fail_too() -> None:
    def write(_: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_batches("", numbered(1), int, [0], write)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_failing_computation_keeps_what_was_computed_before(error: BaseException) -> None:
    failing = Event()
    written: list[int] = []

    def results() -> Iterator[int]:
        yield 0
        yield 1
        failing.set()
        raise error

    def write(number: int) -> None:
        if number == 1:
            assert failing.wait(LONG)
        written.append(number)

    with pytest.raises(type(error)):
        write_batches("", numbered(3), int, results(), write)
    assert written == [0, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_a_result_too_few_or_too_many_is_a_bug_that_shows(count: int) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_batches("", numbered(2), int, range(count), lambda _: None)

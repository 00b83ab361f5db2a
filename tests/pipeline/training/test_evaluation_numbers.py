"""The numbers of an evaluation as text."""

import pytest

from adpa.pipeline.training.evaluation_numbers import comparison, interval_text, measures, number_text


@pytest.mark.parametrize(
    ("value", "text"), [(0.98, "0.98"), (-1.23456, "-1.235"), (312.4, "312.4"), (-1234.5, "-1,234"), (0.0, "0")]
)
def test_a_number_has_four_digits_or_all_before_the_point(value: float, text: str) -> None:
    assert number_text(value) == text


def test_an_interval_has_three_digits_and_no_exponent_for_large_numbers() -> None:
    assert interval_text(0.6123, 0.5812, 0.6421) == "0.612 [0.581, 0.642]"
    assert interval_text(1111.1, 999.7, 12345.6) == "1,111 [1,000, 12,346]"


def test_a_report_has_its_intervals_and_the_numbers_of_both_models() -> None:
    report = {
        "difference": {"mean": 1111.1, "low": 1000.4, "high": 1222.2},
        "student": {"tokens": 1234.5, "ended": 0.98},
        "baseline": {"tokens": 287.1},
        "prompts": 8,
    }
    assert comparison(report) == {"difference": "1,111 [1,000, 1,222]"}
    assert measures(report) == {"tokens": ["1,234", "287.1"], "ended": ["0.98", ""]}

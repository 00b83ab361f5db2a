"""The signals that a method of a study needs follow from its objective."""

from typing import Any

import pytest

from adpa.lab.methods import terms_of
from adpa.pipeline.training.objectives import ObjectiveName, TermWeights


def test_what_a_method_does_not_say_is_as_distill_has_it() -> None:
    assert terms_of("adpa", {}) == {"chosen": TermWeights(nll=1), "sampled": TermWeights(advantage=0.5)}
    assert terms_of("kd", {"kl_weight": 2, "plausibility": 0}) == {"chosen": TermWeights(nll=1, kl=2)}


@pytest.mark.parametrize(
    ("objective", "options", "sampled"),
    [
        ("sft", {}, False),
        ("kd", {}, False),
        ("kd", {"on": "sampled"}, True),
        ("dckd", {}, False),
        ("adpa", {}, True),
        ("adpa", {"on": None}, True),
        ("adpa", {"on": "rejected"}, False),
    ],
)
def test_responses_are_sampled_where_a_term_is_on_them(
    objective: ObjectiveName, options: dict[str, Any], sampled: bool
) -> None:
    assert ("sampled" in terms_of(objective, options)) == sampled

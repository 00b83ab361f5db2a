"""The terms of each objective."""

import pytest

from adpa.data.cache.responses import ResponseName
from adpa.errors import OptionError
from adpa.pipeline.training.objectives import ObjectiveName, TermWeights, objective_terms


def test_the_objectives_are_those_of_the_paper() -> None:
    def terms(name: ObjectiveName) -> dict[ResponseName, TermWeights]:
        return objective_terms(name, None, None, advantage_weight=3.0)

    assert terms("sft") == {"chosen": TermWeights(nll=1)}
    assert terms("kd") == {"chosen": TermWeights(nll=1, kl=1)}
    assert terms("dckd") == {"chosen": TermWeights(nll=1, kl=1), "rejected": TermWeights(kl=1)}
    assert terms("adpa") == {"chosen": TermWeights(nll=1), "sampled": TermWeights(advantage=3)}


def test_the_terms_of_kd_and_adpa_can_go_on_other_responses() -> None:
    def terms(name: ObjectiveName, on: ResponseName) -> dict[ResponseName, TermWeights]:
        return objective_terms(name, on, kl_weight=2.0, advantage_weight=3.0)

    assert terms("kd", "chosen") == {"chosen": TermWeights(nll=1, kl=2)}
    assert terms("kd", "sampled") == {"chosen": TermWeights(nll=1), "sampled": TermWeights(kl=2)}
    assert terms("adpa", "rejected") == {"chosen": TermWeights(nll=1), "rejected": TermWeights(kl=2, advantage=3)}
    assert terms("adpa", "chosen") == {"chosen": TermWeights(nll=1, kl=2, advantage=3)}


@pytest.mark.parametrize(
    ("objective", "on", "kl_weight", "message"),
    [
        ("sft", "sampled", None, "--on sampled with sft, whose responses are fixed"),
        ("dckd", "chosen", None, "--on chosen with dckd, whose responses are fixed"),
        ("sft", None, 1.0, "--kl-weight with sft, which has no KL term"),
        ("kd", None, -1.0, "--kl-weight -1; expected 0 or more"),
        ("kd", None, float("nan"), "--kl-weight nan; expected 0 or more"),
    ],
)
def test_what_an_objective_has_no_use_for_is_refused(
    objective: ObjectiveName, on: ResponseName | None, kl_weight: float | None, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        objective_terms(objective, on, kl_weight, 1.0)


def test_an_unknown_objective_is_refused_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"'dpo'; expected one of sft, kd, dckd, adpa"):
        objective_terms("dpo", "sampled", 1.0, 1.0)  # type: ignore[arg-type]

"""Which terms an objective has, and which advantages are plausible."""

import pytest
import torch

from adpa.errors import OptionError
from adpa.pipeline.objectives import TermWeights, objective_terms, plausible_advantages


def test_the_objectives_are_those_of_the_paper() -> None:
    def terms(name, on="sampled"):  # type: ignore[no-untyped-def]
        return objective_terms(name, on, kl_weight=2.0, advantage_weight=3.0)

    assert terms("sft") == {"chosen": TermWeights(nll=1)}
    assert terms("kd") == {"chosen": TermWeights(nll=1, kl=2)}
    assert terms("dckd") == {"chosen": TermWeights(nll=1, kl=2), "rejected": TermWeights(kl=2)}
    assert terms("adpa") == {"chosen": TermWeights(nll=1), "sampled": TermWeights(advantage=3)}
    assert terms("adpa", on="rejected") == {"chosen": TermWeights(nll=1), "rejected": TermWeights(advantage=3)}
    assert terms("adpa", on="chosen") == {"chosen": TermWeights(nll=1, advantage=3)}


def test_an_unknown_objective_is_refused_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"'dpo'; expected one of sft, kd, dckd, adpa"):
        objective_terms("dpo", "sampled", 1.0, 1.0)  # type: ignore[arg-type]


def test_a_positive_advantage_needs_a_plausible_token() -> None:
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    probabilities = torch.tensor([[0.06, 0.04, 0.06, 0.04]])
    kept = plausible_advantages(advantages, probabilities.log(), 0.05)
    assert kept.tolist() == [[2.0, 0.0, -2.0, -2.0]]


def test_no_plausibility_is_the_published_form() -> None:
    advantages = torch.randn(4, 3)
    assert plausible_advantages(advantages, torch.full((4, 3), -50.0), 0.0) is advantages

"""The advantages that count."""

import torch

from adpa.pipeline.training.plausibility import plausible_advantages


def test_a_positive_advantage_needs_a_plausible_token() -> None:
    advantages = torch.tensor([[2.0, 2.0, -2.0, -2.0]])
    probabilities = torch.tensor([[0.06, 0.04, 0.06, 0.04]])
    kept = plausible_advantages(advantages, probabilities.log(), 0.05)
    assert kept.tolist() == [[2.0, 0.0, -2.0, -2.0]]


def test_no_plausibility_is_the_published_form() -> None:
    advantages = torch.randn(4, 3)
    assert plausible_advantages(advantages, torch.full((4, 3), -50.0), 0.0) is advantages

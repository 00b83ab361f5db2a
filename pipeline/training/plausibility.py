"""The advantages that count: a positive one needs a token that the teacher finds plausible.

Shapes: N response tokens, K ids of the teacher's top K.
"""

import torch
from torch import Tensor


def plausible_advantages(advantages: Tensor, teacher_logprobs: Tensor, plausibility: float) -> Tensor:
    """Keeps a positive advantage only if the teacher's probability is at least ``plausibility``.

    log π_dpo − log π_ref can be large for a token that both models find implausible. There the published advantage term
    pulls the student towards a token that nobody would say.

    Args:
        advantages: [N, K].
        teacher_logprobs: [N, K].
        plausibility: a probability below 1; 0 keeps every advantage.
    """
    if plausibility == 0:
        return advantages
    implausible_NK = teacher_logprobs < torch.tensor(plausibility).log()
    return torch.where(implausible_NK, advantages.clamp(max=0), advantages)

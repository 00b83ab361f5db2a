"""The objectives: which terms each one puts on which responses.

Source: Gao et al., "Advantage-Guided Distillation for Preference Alignment in Small Language Models", ICLR 2025
(arXiv 2502.17927). With y_w chosen, y_l rejected and ŷ sampled:

    sft     −log q on y_w
    kd      sft + α · KL(p‖q) on y_w
    dckd    sft + α · [KL(p‖q) on y_w + KL(p‖q) on y_l]
    adpa    sft − γ · Σ_S q_k·A_k on ŷ

Every term is a mean over its own responses' tokens.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from adpa.data.responses import ResponseName
from adpa.errors import OptionError

ObjectiveName = Literal["sft", "kd", "dckd", "adpa"]


class TermWeights(NamedTuple):
    """The weight of each term on the tokens of one response set."""

    nll: float = 0.0
    kl: float = 0.0
    advantage: float = 0.0


def objective_terms(
    objective: ObjectiveName, on: ResponseName, kl_weight: float, advantage_weight: float
) -> dict[ResponseName, TermWeights]:
    """The terms of an objective by response set; ``on`` is where the advantage term of adpa goes.

    Raises:
        OptionError: there is no such objective or response set.
    """
    if objective not in get_args(ObjectiveName):
        raise OptionError(f"objective {objective!r}; expected one of {', '.join(get_args(ObjectiveName))}")
    if on not in get_args(ResponseName):
        raise OptionError(f"--on {on!r}; expected one of {', '.join(get_args(ResponseName))}")
    for option, weight in (("--kl-weight", kl_weight), ("--advantage-weight", advantage_weight)):
        if not weight >= 0:
            raise OptionError(f"{option} {weight:g}; expected 0 or more")
    if objective == "sft":
        return {"chosen": TermWeights(nll=1.0)}
    if objective == "kd":
        return {"chosen": TermWeights(nll=1.0, kl=kl_weight)}
    if objective == "dckd":
        return {"chosen": TermWeights(nll=1.0, kl=kl_weight), "rejected": TermWeights(kl=kl_weight)}
    if on == "chosen":
        return {"chosen": TermWeights(nll=1.0, advantage=advantage_weight)}
    return {"chosen": TermWeights(nll=1.0), on: TermWeights(advantage=advantage_weight)}


def plausible_advantages(advantages: Tensor, teacher_logprobs: Tensor, plausibility: float) -> Tensor:
    """Keeps a positive advantage only where the teacher's probability is at least ``plausibility``.

    log π_dpo − log π_ref can be large and positive for a token that both models find implausible; where it is, the
    published advantage term pulls the student towards a token that nobody would say.

    Args:
        advantages: [N, K].
        teacher_logprobs: [N, K].
        plausibility: a probability; 0 keeps everything.
    """
    if plausibility == 0:
        return advantages
    implausible = teacher_logprobs < torch.tensor(plausibility).log()
    return torch.where(implausible, advantages.clamp(max=0), advantages)

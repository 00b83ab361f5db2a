"""The objectives: the terms of each one, and the responses that they are on. Imports no torch.

Source: Gao et al., "Advantage-Guided Distillation for Preference Alignment in Small Language Models", ICLR 2025
(arXiv 2502.17927). With y_w chosen, y_l rejected and ŷ sampled:

    sft     −log q on y_w
    kd      sft + α · KL(p‖q) on y_w
    dckd    sft + α · [KL(p‖q) on y_w + KL(p‖q) on y_l]
    adpa    sft − γ · Σ_S q_k·A_k on ŷ

Every term is a mean over its own responses' tokens. On ŷ instead of y_w, kd is on-policy distillation; adpa can have
KL(p‖q) beside the advantages, which the paper does without.
"""

from typing import Literal, NamedTuple

from adpa.data.cache.responses import ResponseName
from adpa.errors import OptionError
from adpa.pipeline.option_checks import check_choices
from adpa.pipeline.training.ranges import check_ranges

ObjectiveName = Literal["sft", "kd", "dckd", "adpa"]


class TermWeights(NamedTuple):
    """The weight of each term on the tokens of one response set."""

    nll: float = 0.0
    kl: float = 0.0
    advantage: float = 0.0


def objective_terms(
    objective: ObjectiveName, on: ResponseName | None, kl_weight: float | None, advantage_weight: float
) -> dict[ResponseName, TermWeights]:
    """The terms of an objective by response set.

    Args:
        objective: its name.
        on: where the KL term of kd (default: chosen) or the advantage term of adpa (default: sampled) goes.
        kl_weight: α; default: 1 for kd and dckd, 0 for adpa.
        advantage_weight: γ of adpa.

    Raises:
        OptionError: an unknown objective or response set, a weight out of its range, or an option that the
            objective lacks.
    """
    check_choices({"--objective": (objective, ObjectiveName)})
    if on is not None:
        check_choices({"--on": (on, ResponseName)})
    if on is not None and objective not in ("kd", "adpa"):
        raise OptionError(f"--on {on} with {objective}, whose responses are fixed", "leave it out, or use kd or adpa")
    if kl_weight is not None and objective == "sft":
        raise OptionError("--kl-weight with sft, which has no KL term", "leave it out, or use kd, dckd or adpa")
    check_ranges({"kl_weight": kl_weight, "advantage_weight": advantage_weight})
    nll = TermWeights(nll=1.0)
    if objective == "sft":
        return {"chosen": nll}
    if objective == "adpa":
        term, on = TermWeights(kl=kl_weight or 0.0, advantage=advantage_weight), on or "sampled"
    else:
        term, on = TermWeights(kl=1.0 if kl_weight is None else kl_weight), on or "chosen"
    if objective == "dckd":
        return {"chosen": term._replace(nll=1.0), "rejected": term}
    return {"chosen": term._replace(nll=1.0)} if on == "chosen" else {"chosen": nll, on: term}

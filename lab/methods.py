"""The training methods that a study compares. Each calls the same functions as users."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from adpa.data.cache.responses import ResponseName
from adpa.data.cache.signals import read_scoring, read_signals
from adpa.lab.advantages import CHANGES, AdvantageName, change_signals, towards_prior
from adpa.lab.checkpoints import Laboratory, align
from adpa.lab.evaluate import MAX_NEW_TOKENS
from adpa.pipeline.distill import distill
from adpa.pipeline.precompute import precompute
from adpa.pipeline.training.objectives import ObjectiveName, TermWeights, objective_terms

OBJECTIVES = (*get_args(ObjectiveName), "dpo")


@dataclass(frozen=True)
class Method:
    """One training method.

    Attributes:
        objective: an objective of ``adpa distill``, or ``dpo`` for TRL's DPO.
        options: options of ``distill``, or of ``align`` for DPO.
        after: the method whose student this one starts from; default: the SFT student.
        control: the method whose reward the table subtracts from this one's.
        top_k: K, the number of teacher ids for each token.
        advantages: definition of the advantages; see ``adpa.lab.advantages``.
        prior: whether KL terms pull towards the SFT student instead of the teacher.
        trials: options to try on the tuning seeds; the best ones are used.
        swept: the options in which the methods of a sweep differ.
    """

    objective: ObjectiveName | Literal["dpo"]
    options: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None
    control: str | None = None
    top_k: int = 16
    advantages: AdvantageName = "log ratio"
    prior: bool = False
    trials: tuple[Mapping[str, Any], ...] = ()
    swept: Mapping[str, float] = field(default_factory=dict)


def file_name(name: str) -> str:
    """A method's name as the name of a file or directory."""
    return re.sub(r"[^\w.+=]+", "-", name).strip("-.")


def trial_name(name: str, number: int) -> str:
    """The name of a method's trial, counted from 1."""
    return f"{name}, trial {number}"


def method_options(objective: str) -> dict[str, Any]:
    """The options that a method of this objective can have, with their defaults."""
    parameters = inspect.signature(align if objective == "dpo" else distill).parameters.values()
    set_by_the_study = {"seed", "scoring", "response_set", "save_steps", "resume_from_checkpoint", "report_to"}
    return {
        one.name: one.default
        for one in parameters
        if one.default is not inspect.Parameter.empty and one.name not in set_by_the_study
    }


def terms_of(objective: ObjectiveName, options: Mapping[str, Any]) -> dict[ResponseName, TermWeights]:
    """The terms of the loss in ``distill`` with these options.

    Raises:
        OptionError: the objective does not use one of the options.
    """
    values = {**method_options(objective), **options}
    return objective_terms(objective, values["on"], values["kl_weight"], values["advantage_weight"])


def train(method: Method, laboratory: Laboratory, start: Path, cache: Path, output: Path, seed: int) -> None:
    """Trains the student in ``start`` and saves it in ``output``. All methods share the signals in ``cache``."""
    if method.objective == "dpo":
        align(start, laboratory.preferences, output, seed, **method.options)
        return
    terms = terms_of(method.objective, method.options)

    def score_with(reference: Path) -> str:
        return precompute(
            str(laboratory.teacher),
            str(laboratory.preferences),
            cache,
            reference=str(reference),
            student=str(start) if "sampled" in terms else None,
            top_k=method.top_k,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
            engine="hf",
        ).scoring

    scoring = score_with(laboratory.reference)
    if method.prior:
        prior = read_signals(cache, read_scoring(cache, score_with(laboratory.student)))
        scoring = change_signals(cache, scoring, "the student's KL", towards_prior(prior))
    if method.advantages != "log ratio":
        scoring = change_signals(cache, scoring, f"{method.advantages} advantages", CHANGES[method.advantages])
    distill(method.objective, str(start), cache, output, scoring=scoring, seed=seed, **method.options)

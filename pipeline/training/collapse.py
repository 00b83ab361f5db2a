"""Watching the student in training: its statistics on the same few examples at every log, and the sign of a collapse.

The examples stay the same, so that what changes between two logs is the student. The first log is the student before
training.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from adpa.data.batches import Collator, TrainingExamples
from adpa.data.summary import PLAUSIBLE
from adpa.kernels.student_statistics import IMPLAUSIBLE, StudentStatistics
from adpa.pipeline.training.objectives import TermWeights

PROBE_EXAMPLES = 32  # over all ranks, spread evenly over the data
MICRO_BATCHES = 4  # in a batch
UNOBSERVED = ("labels", "role", "rows", "tail_logprob")
RISE = 0.1  # of the student's mass
IN_A_ROW = 3  # logs


class Probe:
    """The examples on which a student is watched: their responses with an advantage term, or else with a KL term.

    Every rank reads its share of them. A batch has the examples of several micro-batches: without a backward pass no
    activation is kept. All ranks have the same number of batches, because calling a sharded model takes all of them.
    """

    def __init__(
        self,
        examples: TrainingExamples,
        collate: Collator,
        terms: Sequence[TermWeights],
        micro_batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        self._accelerator = accelerator
        with_advantage = {role for role, weights in enumerate(terms) if weights.advantage != 0}
        self._watches_advantage = bool(with_advantage)
        roles = with_advantage or {role for role, weights in enumerate(terms) if weights.kl != 0}
        watched_examples = min(PROBE_EXAMPLES, len(examples))
        numbers = [place * len(examples) // watched_examples for place in range(watched_examples)]
        ranks = accelerator.num_processes
        mine = numbers[accelerator.process_index :: ranks]
        batch_size = MICRO_BATCHES * micro_batch_size
        starts = range(0, math.ceil(watched_examples / ranks), batch_size) if roles else ()
        self._batches = []
        for start in starts:
            counted = mine[start : start + batch_size]
            shown = [examples[number] for number in counted or numbers[:1]]
            batch = collate([[sequence for sequence in example if sequence.role in roles] for example in shown])
            self._batches.append(
                (
                    {name: tensor.to(accelerator.device) for name, tensor in batch.items() if name not in UNOBSERVED},
                    bool(counted),
                )
            )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The means of the student's statistics over the response tokens of all ranks, by the names they are logged by.

        Nothing if no term needs signals. Every rank has to call it. Dropout is off meanwhile, so that no random number
        is drawn.

        Args:
            model: the student that ``attach_distill_head`` prepared, in whatever wraps it in training.
        """
        sums = torch.zeros(1 + len(StudentStatistics._fields), device=self._accelerator.device)
        training = model.training
        model.eval()
        for batch, counts in self._batches:
            with torch.no_grad(), self._accelerator.autocast():
                statistics = model(**batch, observe=True)
            tokens = sums.new_tensor(len(statistics.entropy))
            sums += counts * torch.stack([tokens, *(each_N.sum() for each_N in statistics)])
        model.train(training)
        observed, *totals = self._accelerator.reduce(sums, reduction="sum").tolist()
        means = {
            name: total / observed for name, total in zip(StudentStatistics._fields, totals, strict=True) if observed
        }
        if not self._watches_advantage:
            means.pop("advantage", None)
        return {f"student/{name}": mean for name, mean in means.items()}


def collapse(log: Sequence[Mapping[str, Any]], plausibility: float) -> str | None:
    """What to tell the user if the advantage term has pulled the student towards tokens that nobody would say.

    The sign of it: at ``IN_A_ROW`` logs in a row the student's mass on implausible tokens is more than ``RISE`` above
    what it was before training, and its mean advantage is above what it was too. In training that goes well the mass
    falls; where the learning rate is highest it may rise for a while. If the advantage falls, the cause is another one.

    Tuned on twenty runs of the laboratory (two seeds; γ of 0.5, 1, 2, 4 and 8, with and without ``--plausibility
    0.05``; 141 steps at a peak rate of 3e-3, logged every 10). The three runs that ended with a lower reward than the
    student before training rose by 0.12 or more at three logs in a row, the seventeen others by 0.07 at most.

    Args:
        log: the entries of Trainer's history; of those with ``student/advantage`` the first is the student before
            training.
        plausibility: what the run was given.
    """
    before, *watched = [entry for entry in log if "student/advantage" in entry] or [{}]
    if before.get("step") != 0:  # a run that was begun by a version which did not watch
        return None
    in_a_row = 0
    for entry in watched:
        more_mass = entry["student/implausible_mass"] > before["student/implausible_mass"] + RISE
        in_a_row = in_a_row + 1 if more_mass and entry["student/advantage"] > before["student/advantage"] else 0
        if in_a_row == IN_A_ROW:
            guard = f"--plausibility {PLAUSIBLE:g} or " if plausibility < PLAUSIBLE else ""
            return (
                f"step {entry['step']}: {entry['student/implausible_mass']:.0%} of the student's mass is on tokens to "
                f"which the teacher gives less than {IMPLAUSIBLE:g} or that are not in its top K, "
                f"{before['student/implausible_mass']:.0%} before training: the advantage term pulls it "
                f"towards tokens that nobody would say; start anew with {guard}a smaller --advantage-weight"
            )
    return None

"""The watch on training: the student's statistics on the same few examples at every log, and the signs of a collapse.

The examples stay the same, so that a change between two logs is a change of the student. The first log is of the
student before training.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from adpa.data.batches import Collator, TrainingExamples
from adpa.data.summary import PLAUSIBLE
from adpa.kernels.student_statistics import UNLIKELY, StudentStatistics
from adpa.pipeline.training.objectives import TermWeights

WATCHED_EXAMPLES = 32  # over all ranks, spread evenly over the data
MICRO_BATCHES = 4  # in a batch
UNUSED = ("labels", "set_number", "rows", "tail_logprob")
# The ``StudentStatistics`` in logs and in adpa.json. The third is the unlikely mass: its key keeps an older name.
KEYS = ("student/entropy", "student/mass_on_topk", "student/implausible_mass", "student/advantage")
MASS, ADVANTAGE = KEYS[2:]
RISE = 0.1  # of the student's mass
IN_A_ROW = 3  # logs


class Watch:
    """The examples on which the student is measured: their responses with an advantage term, or else with a KL term.

    Every rank reads its share of them. A batch has the examples of several micro-batches, because without a backward
    pass no activation stays in memory. All ranks have the same number of batches, because a sharded model needs every
    rank for each call.
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
        with_advantage = {number for number, weights in enumerate(terms) if weights.advantage != 0}
        self._has_advantage = bool(with_advantage)
        watched_sets = with_advantage or {number for number, weights in enumerate(terms) if weights.kl != 0}
        watched_examples = min(WATCHED_EXAMPLES, len(examples))
        numbers = [place * len(examples) // watched_examples for place in range(watched_examples)]
        ranks = accelerator.num_processes
        mine = numbers[accelerator.process_index :: ranks]
        batch_size = MICRO_BATCHES * micro_batch_size
        starts = range(0, math.ceil(watched_examples / ranks), batch_size) if watched_sets else ()
        self._batches = []
        for start in starts:
            counted = mine[start : start + batch_size]
            shown = [examples[number] for number in counted or numbers[:1]]
            batch = collate(
                [[sequence for sequence in example if sequence.set_number in watched_sets] for example in shown]
            )
            self._batches.append(
                (
                    {name: tensor.to(accelerator.device) for name, tensor in batch.items() if name not in UNUSED},
                    bool(counted),
                )
            )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The means of the student's statistics over the response tokens of all ranks, by ``KEYS``.

        Empty if no term needs signals. Every rank must call it. Dropout is off during the call, so that training draws
        the same random numbers.

        Args:
            model: the student after ``attach_distill_head``, with the wrapper that it has in training.
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
        means = {key: total / observed for key, total in zip(KEYS, totals, strict=True) if observed}
        if not self._has_advantage:
            means.pop(ADVANTAGE, None)
        return means


def collapse(log: Sequence[Mapping[str, Any]], plausibility: float) -> str | None:
    """A warning if the advantage term has pulled the student towards tokens that nobody would say; else None.

    The signs: at ``IN_A_ROW`` logs in a row the student's mass on unlikely tokens is more than ``RISE`` above its value
    before training, and its mean advantage is above its value before training. In a healthy run the mass falls; it may
    rise for a while at the peak of the learning rate. A falling advantage means another cause.

    Tuned on twenty runs of the laboratory (two seeds; γ of 0.5, 1, 2, 4 and 8, with and without ``--plausibility
    0.05``; 141 steps at a peak rate of 3e-3, logged every 10). The three runs that ended with a lower reward than the
    student before training rose by 0.12 or more at three logs in a row, the seventeen others by 0.07 at most.

    Args:
        log: Trainer's history; the first entry with ``student/advantage`` is of the student before training.
        plausibility: the run's ``--plausibility``.
    """
    before, *watched = [entry for entry in log if ADVANTAGE in entry] or [{}]
    if before.get("step") != 0:  # resumed from a version without the watch
        return None
    in_a_row = 0
    for entry in watched:
        more_mass = entry[MASS] > before[MASS] + RISE
        in_a_row = in_a_row + 1 if more_mass and entry[ADVANTAGE] > before[ADVANTAGE] else 0
        if in_a_row == IN_A_ROW:
            guard = f"--plausibility {PLAUSIBLE:g} or " if plausibility < PLAUSIBLE else ""
            return (
                f"step {entry['step']}: {entry[MASS]:.0%} of the student's probability is on unlikely tokens, "
                f"{before[MASS]:.0%} before training (teacher's probability below {UNLIKELY:g}, or not in its top K): "
                f"the advantage term pulls the student towards tokens that nobody would say; "
                f"start anew with {guard}a smaller --advantage-weight"
            )
    return None

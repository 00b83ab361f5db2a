"""What the answers of a model are like, and how those of two models compare, from the files of a cache.

The implicit reward of a response y to a prompt x is Σ_t log π_teacher(y_t) − log π_reference(y_t), the reward that DPO
gave the teacher, divided by its β (Rafailov et al., Direct Preference Optimization, 2023, equation 5, without the
constant of the prompt). It needs no judge and no reward that somebody programmed, but ADPA trains on it.

Shapes: P distinct prompts, M responses to each, T tokens of a response, N responses of the data.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adpa.data.bootstrap import Interval, bootstrap_interval, win_share
from adpa.data.cache.responses import ResponseSet
from adpa.data.cache.signals import SignalTable
from adpa.data.reward_accuracy import RewardAccuracy, compare_rewards
from adpa.data.sequences import TokenIds

NGRAM = 4


@dataclass(frozen=True)
class AnswerSummary:
    """What a model's responses are like; every number is a mean over its responses.

    Attributes:
        implicit_reward: the sum over the response's tokens, in nats.
        implicit_reward_per_token: the mean over the response's tokens, in nats.
        tokens: length, with the end-of-turn token.
        ended: share of the responses that ended by themselves and were not cut at ``max_new_tokens``.
        repetition: see ``repetition``.
    """

    implicit_reward: float
    implicit_reward_per_token: float
    tokens: float
    ended: float
    repetition: float


@dataclass(frozen=True)
class Comparison:
    """The answers of a student and a baseline. Intervals are of 95 %, of the bootstrap over the prompts of both.

    Attributes:
        student: what the student's responses are like.
        baseline: what the baseline's responses are like.
        win_rate: share of responses whose implicit reward is above that of the baseline's; a tie counts one half.
        win_rate_per_token: the same by the implicit reward per token, which a longer response does not raise.
        difference: the student's implicit reward minus the baseline's, in nats.
        difference_per_token: the same per token.
    """

    student: AnswerSummary
    baseline: AnswerSummary
    win_rate: Interval
    win_rate_per_token: Interval
    difference: Interval
    difference_per_token: Interval


@dataclass(frozen=True)
class Answers:
    """A model's answers; arrays are float64 [P, M].

    Attributes:
        first: the first response to each prompt, by the bytes of the prompt's ids.
        repeated_prompts: pairs left out because an earlier one has the same prompt.
        reward: implicit rewards.
        tokens: lengths.
        ended: 1 where a response ended by itself, else 0.
        repetition: see ``repetition``.
    """

    first: dict[bytes, TokenIds]
    repeated_prompts: int
    reward: NDArray[np.float64]
    tokens: NDArray[np.float64]
    ended: NDArray[np.float64]
    repetition: NDArray[np.float64]

    @property
    def per_token(self) -> NDArray[np.float64]:
        """Implicit rewards per token."""
        return self.reward / self.tokens

    def first_reward(self, prompt: bytes) -> float:
        """The implicit reward of the first response to a prompt."""
        return float(self.reward[list(self.first).index(prompt), 0])

    def summary(self) -> AnswerSummary:
        """The means."""
        return AnswerSummary(
            implicit_reward=float(self.reward.mean()),
            implicit_reward_per_token=float(self.per_token.mean()),
            tokens=float(self.tokens.mean()),
            ended=float(self.ended.mean()),
            repetition=float(self.repetition.mean()),
        )


def read_answers(responses: ResponseSet, signals: SignalTable) -> Answers:
    """Measures sampled responses; of several pairs with the same prompt, the first one counts.

    Args:
        responses: a sampled set.
        signals: the signals of a scoring with a reference, with rows for all of them.
    """
    sampling = responses.info.sampling
    assert sampling is not None
    sequences, numbers = responses.sequences(), signals.locate(responses.table["key"])
    firsts: dict[bytes, int] = {}  # where the M responses to a prompt begin; they stand together
    for start in range(0, len(sequences), sampling.samples_per_prompt):
        firsts.setdefault(sequences[start].prompt_ids.tobytes(), start)

    def measure(row: int) -> tuple[float, float, float, float]:
        advantages_T = signals.row(int(numbers[row])).token_advantages
        assert advantages_T is not None, "a scoring without a reference"
        response_ids = sequences[row].response_ids
        ended = int(response_ids[-1]) in responses.info.ends
        return float(advantages_T.sum(dtype=np.float64)), len(response_ids), float(ended), repetition(response_ids)

    rows = [range(start, start + sampling.samples_per_prompt) for start in firsts.values()]
    measured = np.array([[measure(row) for row in of_prompt] for of_prompt in rows])
    repeated = len(sequences) // sampling.samples_per_prompt - len(firsts)
    first = {prompt: sequences[start].response_ids for prompt, start in firsts.items()}
    return Answers(first, repeated, *np.moveaxis(measured, -1, 0))


def compare_answers(student: Answers, baseline: Answers) -> Comparison:
    """Compares two models on the same prompts."""
    assert [*student.first] == [*baseline.first], "both answer the same data"
    return Comparison(
        student=student.summary(),
        baseline=baseline.summary(),
        win_rate=_over_prompts(win_share(student.reward, baseline.reward)),
        win_rate_per_token=_over_prompts(win_share(student.per_token, baseline.per_token)),
        difference=_over_prompts(student.reward - baseline.reward),
        difference_per_token=_over_prompts(student.per_token - baseline.per_token),
    )


def repetition(response_ids: TokenIds) -> float:
    """The share of repeated 4-grams of tokens: 1 − distinct / all; 0 for a response of fewer than 4 tokens.

    Args:
        response_ids: int32 [T].
    """
    if len(response_ids) < NGRAM:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(response_ids, NGRAM)
    return 1 - len(np.unique(ngrams, axis=0)) / len(ngrams)


def _over_prompts(values_PM: NDArray[np.float64]) -> Interval:
    return bootstrap_interval(values_PM.mean(axis=1)[None])


def perplexity(responses: ResponseSet, signals: SignalTable) -> float:
    """exp(−Σ log π(y_t | x, y_<t) / Σ T): the sums go over the tokens of all responses, their end-of-turn included.

    The tokens of the prompts x are given and do not count (Jelinek et al., Perplexity, 1977, for a sequence after a
    prompt).

    Args:
        responses: the responses.
        signals: the signals of a scoring by the model π, with rows for all of them.
    """
    logprobs_N, tokens_N = _log_probabilities(responses, signals)
    return float(np.exp(-logprobs_N.sum() / tokens_N.sum()))


def student_rewards(
    chosen: ResponseSet, rejected: ResponseSet, student: SignalTable, baseline: SignalTable
) -> RewardAccuracy | None:
    """The reward accuracy of a student: the share of pairs whose chosen response has the larger reward of its own.

    The reward of a response y is Σ_t log π_student(y_t) − log π_baseline(y_t), DPO's implicit reward with β = 1 and the
    baseline as its reference (Rafailov et al., 2023, equation 5; TRL logs the same as ``rewards/accuracies``). A pair
    of two equal responses does not count; without any other pair there is no accuracy.

    Args:
        chosen: the chosen responses.
        rejected: the rejected responses of the same examples.
        student: the signals of a scoring by the student, with rows for all of them.
        baseline: the same by the baseline.
    """
    assert chosen.table["example_id"].equals(rejected.table["example_id"]), "pairs in another order"
    rewards = [_log_probabilities(one, student)[0] - _log_probabilities(one, baseline)[0] for one in (chosen, rejected)]
    keys, others = (one.table["key"].to_pylist() for one in (chosen, rejected))
    counted_N = np.array([key != other for key, other in zip(keys, others, strict=True)])
    return compare_rewards(rewards[0][counted_N], rewards[1][counted_N])


def _log_probabilities(responses: ResponseSet, signals: SignalTable) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σ_t log π of each response, and its number of tokens; both [N]."""
    logprobs = [signals.row(int(number)).token_logprobs for number in signals.locate(responses.table["key"])]
    return np.array([row.sum(dtype=np.float64) for row in logprobs]), np.array([len(row) for row in logprobs], float)

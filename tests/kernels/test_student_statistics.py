"""The statistics are their definitions, in float64 and one token at a time, in every case the head meets.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

import math
from collections.abc import Callable

import pytest
import torch
from tests.kernels.oracle import Problem, logits_of, random_problem
from tests.kernels.test_head import CASES, in_float64
from tests.kernels.test_head_costs import Watch

from adpa.kernels import student_statistics as module
from adpa.kernels.student_statistics import UNLIKELY, StudentStatistics, student_statistics


def statistics_of(problem: Problem) -> StudentStatistics:
    return student_statistics(
        problem.hidden,
        problem.weight,
        problem.topk_ids,
        problem.teacher_logprobs,
        problem.advantages,
        bias=problem.bias,
        softcap=problem.softcap,
        logit_scale=problem.logit_scale,
    )


def definition(problem: Problem) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = []
    q_NV = logits_of(in_float64(problem)).detach().softmax(dim=1)
    table = (problem.topk_ids, problem.teacher_logprobs.double(), problem.advantages.double())
    for q_V, *row in zip(q_NV.tolist(), *(column.tolist() for column in table), strict=True):
        in_s: dict[int, tuple[float, float]] = {}
        for token, logprob, advantage in zip(*row, strict=True):
            if 0 <= token < len(q_V):
                in_s.setdefault(token, (logprob, advantage))
        likely = [token for token, (logprob, _) in in_s.items() if logprob >= math.log(UNLIKELY)]
        outside = 1 - sum(math.exp(logprob) for logprob, _ in in_s.values())
        unknown = min(row[0], default=0) < 0 and outside >= UNLIKELY and len(likely) == len(in_s)
        rows.append(
            (
                -sum(q * math.log(q) for q in q_V if q > 0),
                sum(q_V[token] for token in in_s),
                sum(q for token, q in enumerate(q_V) if token not in likely and not (unknown and token not in in_s)),
                sum(q_V[token] * advantage for token, (_, advantage) in in_s.items() if math.isfinite(advantage)),
            )
        )
    return rows


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_the_statistics_are_the_definitions_when(make: Callable[[], Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    problem = make()
    tolerance = 1e-5 if problem.hidden.dtype in (torch.float32, torch.float64) else 0.05
    found_4N = torch.stack(statistics_of(problem))
    expected_4N = torch.tensor(definition(problem), dtype=torch.float64).reshape(-1, 4).mT
    finite_N = logits_of(problem).isfinite().all(dim=1) | ~problem.hidden.isnan().any(dim=1)
    torch.testing.assert_close(found_4N[:, finite_N].double(), expected_4N[:, finite_N], rtol=tolerance, atol=tolerance)
    assert not found_4N.requires_grad


def test_a_token_is_unlikely_below_a_teacher_probability_of_one_in_a_hundred() -> None:
    equal = random_problem(N=1, V=4, d=2, K=3)._replace(
        hidden=torch.zeros(1, 2),
        topk_ids=torch.tensor([[2, 0, 1]]),
        teacher_logprobs=torch.tensor([[0.97, 0.011, 0.009]]).log(),
    )
    assert statistics_of(equal).unlikely_mass.item() == pytest.approx(0.5)
    assert statistics_of(equal).entropy.item() == pytest.approx(math.log(4))


def test_outside_a_nucleus_of_likely_tokens_nothing_is_known_to_be_unlikely() -> None:
    """The teacher gives 0.30 to the second token; a nucleus of 0.5 does not have it."""
    teacher = torch.tensor([[0.55, 0.30, 0.15]])
    problem = random_problem(N=1, V=3, d=3, K=3)._replace(
        hidden=teacher.log(), weight=torch.eye(3), topk_ids=torch.tensor([[0, 1, 2]]), teacher_logprobs=teacher.log()
    )
    assert statistics_of(problem).unlikely_mass.item() == pytest.approx(0, abs=1e-6)
    cut = problem._replace(topk_ids=torch.tensor([[0, -1, -1]]), teacher_logprobs=torch.tensor([[0.55, 0, 0]]).log())
    assert statistics_of(cut).unlikely_mass.item() == pytest.approx(0, abs=1e-6)
    sure = cut._replace(teacher_logprobs=torch.tensor([[0.995, 0, 0]]).log())
    assert statistics_of(sure).unlikely_mass.item() == pytest.approx(0.45)


def test_the_logits_of_all_rows_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 8)
    problem = random_problem(N=64, V=1000)
    with Watch() as watch:
        statistics_of(problem)
    transposed_weight = 1000 * 8 * 4
    assert watch.largest == max(8 * 1000 * 4, transposed_weight)

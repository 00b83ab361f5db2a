"""Laws of the losses, which hold for every student and teacher.

Shapes: N rows, V vocabulary, K teacher ids.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine with a GPU may lack it

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.oracle import BACKENDS, Problem, logits_of, problem_of_logits, random_problem, run
from torch import Tensor

from adpa.kernels.head import HeadLosses, distill_head

ROW_FIELDS = Problem._fields[:1] + Problem._fields[2:10]
any_step = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """In float64, so that a law either holds to 1e-9 or does not hold."""
    V = draw(st.integers(2, 40))
    return random_problem(
        N=draw(st.integers(1, 9)),
        V=V,
        d=draw(st.integers(1, 6)),
        K=draw(st.integers(1, V)),
        scale=draw(st.floats(0.01, 5)),
        dtype=torch.float64,
        seed=draw(st.integers(0, 2**32)),
    )


def gradients(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(distill_head(*problem, **options)[0], (problem.hidden, problem.weight))


def rows(problem: Problem, index: Tensor | slice) -> Problem:
    return problem._replace(**{name: getattr(problem, name)[index] for name in ROW_FIELDS})


def losses(problem: Problem) -> HeadLosses:
    return distill_head(*problem)[1]


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@any_step
@given(problems())
def test_kl_is_never_negative(problem: Problem) -> None:
    p_sum_N = problem.teacher_logprobs.double().exp().sum(1) + problem.tail_logprob.double().exp()
    normalised_NK = problem.teacher_logprobs.double() - p_sum_N.log()[:, None]
    tail_N = problem.tail_logprob.double() - p_sum_N.log()
    assert (losses(problem._replace(teacher_logprobs=normalised_NK, tail_logprob=tail_N)).kl >= -1e-12).all()


@any_step
@given(problems())
def test_kl_and_its_gradient_vanish_when_the_student_is_the_teacher(problem: Problem) -> None:
    logq_NV = logits_of(problem).detach().log_softmax(dim=1)
    topk = logq_NV.topk(problem.topk_ids.shape[1], dim=1)
    tail_N = logq_NV.scatter(1, topk.indices, -torch.inf).logsumexp(dim=1)
    zeros_N = torch.zeros(len(logq_NV))
    agreeing = problem._replace(
        topk_ids=topk.indices,
        teacher_logprobs=topk.values,
        tail_logprob=tail_N,
        nll_weight=zeros_N,
        advantage_weight=zeros_N,
    )
    assert_close(losses(agreeing).kl, zeros_N.double())
    for gradient in gradients(agreeing):
        assert_close(gradient, torch.zeros_like(gradient))


@any_step
@given(problems())
def test_merging_a_token_into_the_tail_never_raises_the_kl(problem: Problem) -> None:
    lacking_NK = problem.topk_ids.clone()
    lacking_NK[:, 0] = len(problem.weight)
    merged = losses(problem._replace(topk_ids=lacking_NK)).kl
    assert (merged <= losses(problem).kl + 1e-9).all()


@any_step
@given(problems(), st.floats(-10, 10))
def test_raising_all_advantages_lowers_the_loss_by_the_students_mass_on_them(problem: Problem, c: float) -> None:
    mass_N = logits_of(problem).detach().softmax(dim=1).gather(1, problem.topk_ids).sum(dim=1)
    raised = problem._replace(advantages=problem.advantages.double() + c)
    assert_close(losses(raised).advantage, losses(problem).advantage - c * mass_N)


@any_step
@given(problems(), st.floats(-10, 10))
def test_a_baseline_of_the_advantages_over_the_whole_vocabulary_teaches_nothing(problem: Problem, c: float) -> None:
    whole = problem_of_logits(logits_of(problem).detach())
    ids_NV = torch.arange(len(problem.weight)).expand(len(problem.hidden), -1)
    advantages_NV = torch.linspace(-1, 1, len(problem.weight), dtype=torch.float64).expand_as(ids_NV)
    whole = whole._replace(topk_ids=ids_NV, advantages=advantages_NV, teacher_logprobs=advantages_NV.log_softmax(dim=1))
    assert_close(gradients(whole._replace(advantages=advantages_NV + c)), gradients(whole))


@any_step
@given(problems())
def test_the_gradient_of_a_rows_logits_sums_to_zero(problem: Problem) -> None:
    dlogits_NV, _ = gradients(problem_of_logits(logits_of(problem).detach()))
    assert_close(dlogits_NV.sum(dim=1), torch.zeros(len(dlogits_NV)).double())


@any_step
@given(problems(), st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(problem: Problem, c: float) -> None:
    shifted = problem._replace(bias=torch.full((len(problem.weight),), c).double())
    assert_close(distill_head(*shifted), distill_head(*problem))
    assert_close(gradients(shifted), gradients(problem))


@any_step
@given(problems(), st.randoms())
def test_the_order_of_rows_does_not_matter(problem: Problem, random: Any) -> None:
    order_N = torch.tensor(random.sample(range(len(problem.hidden)), len(problem.hidden)))
    shuffled = rows(problem, order_N)
    assert_close(distill_head(*shuffled)[0], distill_head(*problem)[0])
    assert_close(losses(shuffled), HeadLosses(*(term_N[order_N] for term_N in losses(problem))))
    assert_close(gradients(shuffled)[1], gradients(problem)[1])


@any_step
@given(problems(), st.randoms())
def test_the_order_of_a_rows_ids_does_not_matter(problem: Problem, random: Any) -> None:
    K = problem.topk_ids.shape[1]
    order_K = torch.tensor(random.sample(range(K), K))
    shuffled = problem._replace(
        topk_ids=problem.topk_ids[:, order_K],
        teacher_logprobs=problem.teacher_logprobs[:, order_K],
        advantages=problem.advantages[:, order_K],
    )
    assert_close(distill_head(*shuffled), distill_head(*problem))
    assert_close(gradients(shuffled), gradients(problem))


@any_step
@given(problems(), st.integers(1, 12))
def test_the_chunk_size_does_not_matter(problem: Problem, chunk_rows: int) -> None:
    assert_close(distill_head(*problem, chunk_rows=chunk_rows), distill_head(*problem))
    assert_close(gradients(problem, chunk_rows=chunk_rows), gradients(problem))


@any_step
@given(problems(), st.integers(0, 9))
def test_micro_batches_add_up_to_the_batch(problem: Problem, cut: int) -> None:
    first, second = rows(problem, slice(None, cut)), rows(problem, slice(cut, None))
    assert_close(distill_head(*first)[0] + distill_head(*second)[0], distill_head(*problem)[0])
    (dhidden_a, dweight_a), (dhidden_b, dweight_b) = (
        torch.autograd.grad(distill_head(*part)[0], (problem.hidden, problem.weight)) for part in (first, second)
    )
    assert_close((dhidden_a + dhidden_b, dweight_a + dweight_b), gradients(problem))


@any_step
@given(problems(), st.floats(-8, 8))
def test_the_loss_and_its_gradient_are_linear_in_the_weights(problem: Problem, factor: float) -> None:
    scaled = problem._replace(
        nll_weight=factor * problem.nll_weight.double(),
        kl_weight=factor * problem.kl_weight.double(),
        advantage_weight=factor * problem.advantage_weight.double(),
    )
    assert_close(distill_head(*scaled)[0], factor * distill_head(*problem)[0])
    assert_close(gradients(scaled), tuple(factor * gradient for gradient in gradients(problem)))


@settings(any_step, max_examples=12)
@given(problems())
def test_both_backends_give_the_same(problem: Problem) -> None:
    assert_close(run(problem, "triton"), run(problem, "torch"))
    by_torch, by_triton = (
        torch.autograd.grad(run(problem, backend)[0], (problem.hidden, problem.weight)) for backend in BACKENDS
    )
    assert_close(by_triton, by_torch)

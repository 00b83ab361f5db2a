"""The head and its float64 reference give the oracle's losses and gradients, in every case a cache can hold.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from tests.kernels.oracle import (
    BACKENDS,
    TRITON_DEVICE,
    Backend,
    Problem,
    logits_of,
    oracle_losses,
    problem_of_logits,
    random_problem,
    run,
)
from torch import Tensor
from torch.nn.functional import pad

from adpa.kernels import head, loss_rows, reference

NAN, INF = math.nan, math.inf
Case = Callable[[], Problem]
CASES: list[Case] = []


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton streams even these short rows in several tiles."""
    monkeypatch.setattr(loss_rows, "TILE_BYTES", 128)


def case(make: Case) -> Case:
    CASES.append(make)
    return make


class Result(NamedTuple):
    loss: Tensor
    terms: Tensor
    gradients: tuple[Tensor, ...]


def in_float64(problem: Problem) -> Problem:
    parameters = {name: getattr(problem, name) for name in ("hidden", "weight", "bias")}
    return problem._replace(**{k: t.detach().double().requires_grad_() for k, t in parameters.items() if t is not None})


def result_of(problem: Problem, loss: Tensor, terms_N3: Tensor) -> Result:
    parameters = [t for t in (problem.hidden, problem.weight, problem.bias) if t is not None]
    return Result(loss.detach(), terms_N3, torch.autograd.grad(loss, parameters))


def run_oracle(problem: Problem) -> Result:
    return result_of(problem, *oracle_losses(problem, logits_of(problem)))


def run_head(problem: Problem, backend: Backend, chunk_rows: int = 4, rows: Tensor | None = None) -> Result:
    loss, terms = run(problem, backend, chunk_rows=chunk_rows, rows=rows)
    return result_of(problem, loss, torch.stack(terms, dim=1))


def run_torch(problem: Problem) -> Result:
    return run_head(problem, "torch")


def run_torch_in_float64(problem: Problem) -> Result:
    return run_head(in_float64(problem), "torch")


def run_triton(problem: Problem) -> Result:
    return run_head(problem, "triton")


def run_triton_in_float64(problem: Problem) -> Result:
    return run_head(in_float64(problem), "triton")


def run_reference(problem: Problem) -> Result:
    problem = in_float64(problem)
    loss, terms = reference.distill_head(*problem)
    return result_of(problem, loss, torch.stack(terms, dim=1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if expected.norm() == 0:
        return float(actual.norm())
    return float((actual - expected).norm() / expected.norm())


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    assert relative_error(actual.loss, expected.loss) <= tolerance
    for actual_N, expected_N in zip(actual.terms.T, expected.terms.T, strict=True):
        assert relative_error(actual_N, expected_N) <= tolerance
    for gradient, expected_gradient in zip(actual.gradients, expected.gradients, strict=True):
        assert relative_error(gradient, expected_gradient) <= tolerance


@case
def an_ordinary_step() -> Problem:
    return random_problem()


@case
def the_teachers_tail_is_empty() -> Problem:
    return random_problem()._replace(tail_logprob=torch.full((11,), -INF))


@case
def the_teachers_tail_is_tiny() -> Problem:
    return random_problem()._replace(tail_logprob=torch.full((11,), math.log(1e-12)))


@case
def the_teacher_is_certain() -> Problem:
    logprobs_NK = torch.tensor([0, -INF, -INF, -INF, -INF]).expand(11, 5)
    return random_problem()._replace(teacher_logprobs=logprobs_NK, tail_logprob=torch.full((11,), -INF))


def students_tail_underflows(gap: float) -> Case:
    def make() -> Problem:
        ids_NK = random_problem().topk_ids
        logits_NV = torch.randn(11, 37, generator=torch.Generator().manual_seed(1))
        logits_NV.scatter_add_(1, ids_NK, torch.full(ids_NK.shape, gap))
        return problem_of_logits(logits_NV)._replace(topk_ids=ids_NK)

    make.__name__ = f"the_students_tail_is_at_e^-{gap:.0f}"
    return make


CASES += [students_tail_underflows(gap) for gap in (20.0, 60.0, 120.0)]


@case
def float16_leaves_the_teachers_sum_above_one() -> Problem:
    problem = random_problem()
    return problem._replace(teacher_logprobs=(problem.teacher_logprobs + 4e-3).half())


@case
def the_teacher_or_its_reference_excludes_tokens() -> Problem:
    problem = random_problem()
    problem.teacher_logprobs[::2, 3:] = -INF
    problem.advantages[::2, 3:] = -INF
    problem.advantages[1::2, 0] = INF
    problem.advantages[1::2, 1] = NAN
    return problem


@case
def ids_repeat_in_a_row() -> Problem:
    problem = random_problem(K=6)
    problem.topk_ids[:, 3] = problem.topk_ids[:, 0]
    problem.topk_ids[::2, 1] = problem.topk_ids[::2, 0]
    problem.topk_ids[1::2, 5] = problem.topk_ids[1::2, 4]
    return problem


@case
def padding_has_no_mass_and_ids_the_student_lacks_give_theirs_to_the_tail() -> Problem:
    problem = random_problem()
    problem.topk_ids[::2, 1] = -1
    problem.teacher_logprobs[::2, 1] = NAN
    problem.advantages[::2, 1] = NAN
    problem.topk_ids[:, 2] = 37
    problem.topk_ids[1::2, 4] = 100_000
    return problem


@case
def labels_are_in_s_or_not_or_missing_or_outside_the_vocabulary() -> Problem:
    problem = random_problem()
    problem.labels[:3] = problem.topk_ids[:3, 1]
    problem.labels[3] = next(v for v in range(37) if v not in problem.topk_ids[3])
    problem.labels[4:8] = torch.tensor([-100, -1, 37, 100_000])
    return problem


@case
def a_row_has_only_a_missing_label() -> Problem:
    problem = random_problem()
    problem.labels[2], problem.kl_weight[2], problem.advantage_weight[2] = -100, 0, 0
    problem.hidden.data[2] = 0
    return problem


@case
def there_are_no_rows() -> Problem:
    return random_problem(N=0)


@case
def there_is_one_row() -> Problem:
    return random_problem(N=1)


@case
def every_row_is_masked() -> Problem:
    zeros_N = torch.zeros(11)
    return random_problem()._replace(nll_weight=zeros_N, kl_weight=zeros_N, advantage_weight=zeros_N)


def k_is(K: int) -> Case:
    def make() -> Problem:
        problem = random_problem(K=min(K, 37))
        extra = max(0, K - 37)
        return problem._replace(
            topk_ids=pad(problem.topk_ids, (0, extra), value=-1),
            teacher_logprobs=pad(problem.teacher_logprobs, (0, extra)),
            advantages=pad(problem.advantages, (0, extra)),
            tail_logprob=problem.tail_logprob.clamp(min=-10, max=-0.1),
        )

    make.__name__ = f"k_is_{K}_of_37"
    return make


CASES += [k_is(K) for K in (0, 1, 36, 37, 40)]


@case
def every_row_has_its_own_number_of_ids() -> Problem:
    problem = random_problem(N=6)
    problem.topk_ids[torch.arange(5) >= torch.arange(6)[:, None]] = -1
    return problem


def vocabulary_is(V: int) -> Case:
    def make() -> Problem:
        return random_problem(V=V, K=min(5, V))

    make.__name__ = f"the_vocabulary_has_{V}_tokens"
    return make


CASES += [vocabulary_is(V) for V in (2, 101, 129, 1000)]


@case
def logits_reach_ten_thousand() -> Problem:
    logits_NV = torch.randn(11, 37, generator=torch.Generator().manual_seed(2)).sign() * 1e4
    logits_NV += torch.arange(37) % 3
    return problem_of_logits(logits_NV)._replace(labels=logits_NV.argmax(dim=1))


@case
def all_logits_are_equal() -> Problem:
    return problem_of_logits(torch.full((11, 37), 3.0))


@case
def a_block_of_logits_is_minus_infinity() -> Problem:
    problem = random_problem(bias=True)
    assert problem.bias is not None
    problem.bias.data[16:32] = -INF
    problem.teacher_logprobs[(problem.topk_ids >= 16) & (problem.topk_ids < 32)] = -INF
    return problem._replace(labels=problem.labels % 16)


@case
def the_model_excludes_the_whole_tail() -> Problem:
    problem = random_problem(N=1, bias=True)._replace(tail_logprob=torch.tensor([-INF]))
    assert problem.bias is not None
    keep_V = torch.zeros(37).index_fill(0, problem.topk_ids[0], 1).bool()
    problem.bias.data[~keep_V] = -INF
    return problem._replace(labels=problem.topk_ids[:, 0])


@case
def inputs_are_views_and_ids_are_int32() -> Problem:
    problem = random_problem(N=22, d=16)
    return Problem(
        hidden=problem.hidden[::2, ::2],
        weight=problem.weight[:, 8:].T.contiguous().T,
        labels=problem.labels[::2].int(),
        topk_ids=problem.topk_ids.T.contiguous().T[::2].int(),
        teacher_logprobs=problem.teacher_logprobs[::2],
        tail_logprob=problem.tail_logprob[::2],
        advantages=problem.advantages.flip(1)[::2],
        nll_weight=problem.nll_weight[::2],
        kl_weight=torch.tensor(0.5).expand(11),
        advantage_weight=problem.advantage_weight[::2],
    )


@case
def there_is_no_nll_term_and_no_label() -> Problem:
    return random_problem()._replace(nll_weight=torch.zeros(11), labels=torch.full((11,), -100))


@case
def there_is_no_kl_term_and_no_teacher() -> Problem:
    nan_N = torch.full((11,), NAN)
    return random_problem()._replace(
        kl_weight=torch.zeros(11), teacher_logprobs=nan_N[:, None].expand(11, 5), tail_logprob=nan_N
    )


@case
def there_is_no_advantage_term_and_no_reference() -> Problem:
    return random_problem()._replace(advantage_weight=torch.zeros(11), advantages=torch.full((11, 5), NAN))


@case
def chosen_and_sampled_rows_go_together() -> Problem:
    problem = random_problem(N=12)
    problem.kl_weight[6:] = problem.nll_weight[6:] = problem.advantage_weight[:6] = 0
    problem.teacher_logprobs[6:] = problem.tail_logprob[6:] = problem.advantages[:6] = NAN
    return problem


@case
def every_row_lacks_one_term() -> Problem:
    problem = random_problem()
    problem.nll_weight[0::3] = problem.kl_weight[1::3] = problem.advantage_weight[2::3] = 0
    return problem


@case
def the_head_has_a_bias() -> Problem:
    return random_problem(bias=True)


@case
def the_head_has_a_softcap() -> Problem:
    return random_problem(scale=3)._replace(softcap=5.0)


@case
def the_head_has_a_logit_scale() -> Problem:
    return random_problem()._replace(logit_scale=0.0625)


@case
def the_head_has_a_bias_a_softcap_and_a_logit_scale() -> Problem:
    return random_problem(bias=True, scale=3)._replace(softcap=5.0, logit_scale=0.5)


RUNS = [
    (run_torch, 1e-5),
    (run_triton, 1e-5),
    (run_torch_in_float64, 1e-12),
    pytest.param(run_triton_in_float64, 1e-12, marks=pytest.mark.slow),  # in float32 the same code is fast
    (run_reference, 1e-12),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("run_twin", "tolerance"), RUNS)
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_losses_and_gradients_are_the_oracles_when(
    make: Case, run_twin: Callable[[Problem], Result], tolerance: float
) -> None:
    problem = make()
    assert_same(run_twin(problem), run_oracle(in_float64(problem)), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 70])
def test_losses_and_gradients_are_the_oracles_at_any_chunk_size(chunk_rows: int, backend: Backend) -> None:
    problem = random_problem(N=70)
    assert_same(run_head(problem, backend, chunk_rows), run_oracle(in_float64(problem)), 1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_and_gradients_are_the_oracles_in_tiles_of_full_size(
    softcap: float | None,
) -> None:
    problem = random_problem(N=3, V=9001, K=50, bias=True)._replace(softcap=softcap, logit_scale=0.5)
    assert_same(run_triton(problem), run_oracle(in_float64(problem)), 1e-5)


@pytest.mark.skipif(TRITON_DEVICE == "cpu", reason="takes the memory and the speed of a GPU")
def test_a_chunk_of_more_logits_than_int32_counts_has_the_losses_of_its_rows() -> None:
    N = 40_000
    problem = random_problem(N=1, V=65_536, dtype=torch.bfloat16)
    _, expected = run(problem, "triton")
    tensors = {name: value for name, value in problem._asdict().items() if isinstance(value, Tensor)}
    del tensors["weight"]
    repeated = problem._replace(**{name: value.expand(N, *value.shape[1:]) for name, value in tensors.items()})  # type: ignore[arg-type]
    _, actual = run(repeated, "triton", chunk_rows=N)
    for actual_N, expected_1 in zip(actual, expected, strict=True):
        assert torch.equal(actual_N, expected_1.expand(N))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_caller_may_say_which_rows_count(backend: Backend) -> None:
    """The others are left out, as if their weights were 0."""
    problem = random_problem(N=9, K=4, seed=3)
    rows_M = torch.tensor([7, 0, 3, 4])
    counts_N = torch.zeros(9).index_fill_(0, rows_M, 1)
    weights = {name: getattr(problem, name) * counts_N for name in ("nll_weight", "kl_weight", "advantage_weight")}
    expected = run_oracle(problem._replace(**weights))
    problem.hidden.data[1] = NAN
    actual = run_head(problem, backend, rows=rows_M.to(TRITON_DEVICE if backend == "triton" else "cpu"))
    assert_same(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("run_twin", [run_torch, run_triton, run_reference])
def test_nan_in_a_masked_row_reaches_nothing(run_twin: Callable[[Problem], Result]) -> None:
    problem = random_problem()
    for row_weight in (problem.nll_weight, problem.kl_weight, problem.advantage_weight):
        row_weight[4] = 0
    expected = run_twin(problem)
    problem.hidden.data[4] = NAN
    problem.advantages[4] = problem.teacher_logprobs[4] = problem.tail_logprob[4] = NAN
    assert_same(run_twin(problem), expected, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "chunk_rows"), [("torch", 8), ("torch", 256), ("triton", 8)])
def test_half_precision_errs_at_most_half_again_more_than_eager_half_precision(
    dtype: torch.dtype, backend: Backend, chunk_rows: int
) -> None:
    problem = random_problem(N=32, V=301, d=32, K=10, dtype=dtype, scale=0.3)
    exact = run_oracle(in_float64(problem))
    eager = result_of(problem, *oracle_losses(problem, logits_of(problem).float()))
    actual = run_head(problem, backend, chunk_rows)
    # Triton's interpreter does not round to bfloat16, it cuts off.
    is_cut_off = backend == "triton" and TRITON_DEVICE == "cpu" and dtype == torch.bfloat16
    assert relative_error(actual.loss, exact.loss) <= 1.5 * relative_error(eager.loss, exact.loss) + 1e-6
    for ours, theirs, truth in zip(actual.gradients, eager.gradients, exact.gradients, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, truth) <= (4 if is_cut_off else 1.5) * relative_error(theirs, truth)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("twin", [head.distill_head, reference.distill_head])
def test_gradients_are_those_of_finite_differences(
    twin: Callable[..., tuple[Tensor, object]], softcap: float | None
) -> None:
    problem = random_problem(N=4, V=9, d=3, K=3, bias=True, dtype=torch.float64)
    assert problem.bias is not None
    constants = problem[2:10]

    def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return twin(hidden, weight, *constants, bias=bias, softcap=softcap, logit_scale=0.7)[0]

    assert torch.autograd.gradcheck(loss_of, (problem.hidden, problem.weight, problem.bias))

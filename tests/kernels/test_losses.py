"""The losses of existing logits are the oracle's, in every case of the head, and `torch.compile` keeps them whole.

Shapes: N rows, V vocabulary, K teacher ids.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.kernels.oracle import BACKENDS, TRITON_DEVICE, Backend, Problem, logits_of, oracle_losses, random_problem
from tests.kernels.test_head import CASES
from tests.kernels.test_head_costs import Watch
from torch import Tensor

from adpa.errors import OptionError
from adpa.kernels import losses
from adpa.kernels.losses import advantage_loss, topk_kl

TERMS = ("kl", "advantage")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
each_term = pytest.mark.parametrize("term", TERMS)


def loss_of(term: str, problem: Problem, logits_NV: Tensor, backend: Backend | None = None) -> Tensor:
    """On the device that the backend needs, of logits on any; returned on the CPU."""
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    logits_NV, ids_NK = logits_NV.to(device), problem.topk_ids.to(device)
    if term == "kl":
        logprobs_NK, tail_N = problem.teacher_logprobs.to(device), problem.tail_logprob.to(device)
        return topk_kl(logits_NV, ids_NK, logprobs_NK, tail_N, backend=backend or "auto").cpu()
    return advantage_loss(logits_NV, ids_NK, problem.advantages.to(device), backend=backend or "auto").cpu()


def upstream_of(term: str, problem: Problem) -> Tensor:
    return problem.kl_weight if term == "kl" else problem.advantage_weight


def ready_logits(problem: Problem) -> Tensor:
    return logits_of(problem).detach().requires_grad_()


def assert_oracles(
    term: str, problem: Problem, logits_NV: Tensor, backend: Backend = "torch", tolerance: float = 1e-5
) -> None:
    """With the problem's weights as upstream gradient."""
    upstream_N = upstream_of(term, problem)
    losses_N = loss_of(term, problem, logits_NV, backend)
    (gradient_NV,) = torch.autograd.grad(losses_N, logits_NV, upstream_N.to(losses_N.dtype))

    absent_N = torch.zeros_like(upstream_N)
    alone = problem._replace(nll_weight=absent_N, kl_weight=absent_N, advantage_weight=absent_N)
    alone = alone._replace(kl_weight=upstream_N) if term == "kl" else alone._replace(advantage_weight=upstream_N)
    exact_NV = logits_NV.detach().double().requires_grad_()
    total, terms_N3 = oracle_losses(alone, exact_NV)
    (exact_gradient_NV,) = torch.autograd.grad(total, exact_NV)
    counts_N = upstream_N != 0
    expected_N = terms_N3[:, 1 + TERMS.index(term)]
    assert (losses_N - expected_N)[counts_N].norm() <= tolerance * expected_N.norm() + 1e-12
    assert (gradient_NV - exact_gradient_NV).norm() <= tolerance * exact_gradient_NV.norm() + 1e-12
    assert losses_N.dtype == torch.promote_types(logits_NV.dtype, torch.float32)
    assert gradient_NV.dtype == logits_NV.dtype


@each_term
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_losses_and_gradients_are_the_oracles_when(
    make: Callable[[], Problem], term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    problem = make()
    assert_oracles(term, problem, ready_logits(problem))


@each_term
def test_triton_gives_the_same_in_a_vocabulary_of_any_size(term: str) -> None:
    for V in (37, 48):
        problem = random_problem(N=4, V=V)
        problem.topk_ids[:, 1] = -1
        assert_oracles(term, problem, ready_logits(problem), "triton")


@each_term
@both_backends
def test_half_precision_logits_get_half_precision_gradients(term: str, backend: Backend) -> None:
    for dtype, tolerance in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        problem = random_problem(N=3, dtype=dtype)
        assert_oracles(term, problem, ready_logits(problem), backend, tolerance)


@each_term
@both_backends
def test_there_may_be_no_rows(term: str, backend: Backend) -> None:
    problem = random_problem(N=0)
    assert_oracles(term, problem, ready_logits(problem), backend)


@each_term
def test_logits_may_be_views(term: str) -> None:
    problem = random_problem()
    base = torch.randn(74, 22, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert_oracles(term, problem, base.T[::2, ::2])


@each_term
def test_gradients_are_those_of_finite_differences(term: str) -> None:
    problem = random_problem(N=4, V=9, K=5)
    problem.topk_ids[0, 1], problem.topk_ids[1, 2], problem.topk_ids[2, 3] = -1, 9, problem.topk_ids[2, 0]
    logits_NV = ready_logits(problem).detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: loss_of(term, problem, logits), (logits_NV,))


@each_term
def test_the_logits_are_left_as_they_were_and_the_same_comes_twice(term: str) -> None:
    problem = random_problem()
    logits_NV = ready_logits(problem)
    before = logits_NV.detach().clone()

    def run() -> tuple[Tensor, Tensor]:
        losses_N = loss_of(term, problem, logits_NV)
        return losses_N.detach(), torch.autograd.grad(losses_N.sum(), logits_NV)[0]

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))
    assert torch.equal(logits_NV, before)


@each_term
def test_a_row_that_is_not_used_gets_no_gradient_not_even_nan(term: str) -> None:
    problem = random_problem()
    logits_NV = ready_logits(problem)
    logits_NV.data[4] = torch.nan
    losses_N = loss_of(term, problem, logits_NV)
    assert losses_N.isnan().tolist() == [n == 4 for n in range(11)]
    (gradient_NV,) = torch.autograd.grad(losses_N[torch.arange(11) != 4].sum(), logits_NV)
    assert not gradient_NV[4].any()
    assert gradient_NV.isfinite().all()


@each_term
def test_a_second_derivative_is_refused(term: str) -> None:
    problem = random_problem()
    logits_NV = ready_logits(problem)
    (gradient_NV,) = torch.autograd.grad(loss_of(term, problem, logits_NV).sum(), logits_NV, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient_NV.sum().backward()


@each_term
def test_nothing_is_kept_for_the_backward_pass_but_the_arguments(term: str) -> None:
    problem = random_problem(N=64, V=4001)
    logits_NV = ready_logits(problem).detach().bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(term, problem, logits_NV)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= 64 * 4001}
    assert large == {logits_NV.data_ptr()}


@pytest.mark.parametrize("with_gradient", [False, True])
def test_only_a_chunk_is_held_in_float32(with_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_ROWS", 8)
    problem = random_problem(N=64, V=4001)
    logits_NV = ready_logits(problem).detach().bfloat16()
    gradient_NV = torch.zeros_like(logits_NV) if with_gradient else None
    teacher = (problem.topk_ids, problem.teacher_logprobs, problem.tail_logprob, problem.advantages)
    with Watch() as watch:
        losses._run(logits_NV, *teacher, losses.KL, "torch", weight_N=problem.kl_weight, gradient_NV=gradient_NV)
    assert watch.largest == (64 * 4001 * 2 if with_gradient else 8 * 4001 * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@each_term
def test_the_operators_keep_the_rules_of_torch(term: str, dtype: torch.dtype) -> None:
    problem = random_problem(dtype=dtype)
    logits_NV = ready_logits(problem)
    teacher = (problem.topk_ids, problem.teacher_logprobs, problem.tail_logprob, problem.advantages)
    arguments = (logits_NV, *teacher, 1 + TERMS.index(term), "torch")
    torch.library.opcheck(torch.ops.adpa.row_losses.default, arguments)
    upstream_N = torch.rand(11, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(torch.ops.adpa.row_losses_backward.default, (upstream_N, logits_NV.detach(), *arguments[1:]))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@each_term
def test_torch_compile_keeps_them_in_one_graph(term: str, dynamic: bool, compiler: str) -> None:
    problem = random_problem()
    logits_NV = ready_logits(problem)

    def step(logits: Tensor, weight_N: Tensor) -> Tensor:
        return (weight_N * loss_of(term, problem, 2 * logits)).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    actual, expected = (run(logits_NV, upstream_of(term, problem)) for run in (compiled, step))
    assert torch.equal(actual, expected)
    assert torch.equal(*(torch.autograd.grad(total, logits_NV)[0] for total in (actual, expected)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(37)}, r"logits has shape \[37\], expected \[any, any\]"),
        ({"logits": torch.zeros(11, 0)}, r"logits has shape \[11, 0\], expected at least 1 column"),
        ({"logits": torch.zeros(11, 37).long()}, "logits is torch.int64, expected torch.float32 or"),
        ({"ids": torch.zeros(10, 5).long()}, r"ids has shape \[10, 5\], expected \[11, any\]"),
        ({"ids": torch.zeros(11, 5)}, "ids is torch.float32, expected torch.int32 or torch.int64"),
        ({"logprobs": torch.zeros(11, 4)}, r"logprobs has shape \[11, 4\], expected \[11, 5\]"),
        ({"tail": torch.zeros(11, 1)}, r"tail has shape \[11, 1\], expected \[11\]"),
        ({"tail": torch.zeros(11, device="meta")}, "tail is on meta, expected cpu as logits"),
        ({"ids": torch.zeros(11, 5, device="meta").long()}, "ids is on meta, expected cpu as logits"),
        ({"backend": "cuda"}, "backend is 'cuda'; use 'auto', 'torch' or 'triton'"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    problem = random_problem()
    fitting = {"ids": problem.topk_ids, "logprobs": problem.teacher_logprobs, "tail": problem.tail_logprob}
    with pytest.raises(OptionError, match=message):
        topk_kl(**{"logits": torch.zeros(11, 37), **fitting, **change})


def test_advantages_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"advantages has shape \[11, 4\], expected \[11, 5\]"):
        advantage_loss(torch.zeros(11, 37), torch.zeros(11, 5).long(), torch.zeros(11, 4))


def test_more_ids_than_the_kernel_takes_are_refused_by_name() -> None:
    ids = torch.full((1, 1025), -1, device=TRITON_DEVICE)
    with pytest.raises(OptionError, match=r"ids has shape \[1, 1025\], backend 'triton' takes up to 1024 ids"):
        advantage_loss(ids.new_zeros(1, 37).float(), ids, ids.float(), backend="triton")

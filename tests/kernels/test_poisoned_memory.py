"""Random numbers in memory that holds NaN: a kernel reads only written memory, and writes its whole result.

On a GPU the caching allocator hands out memory that was filled with NaN, and the shapes are large. On a CPU torch
itself fills what it hands out, and Triton interprets.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.kernels.oracle import BACKENDS, TRITON_DEVICE, Backend, Problem, random_problem
from tests.kernels.test_head import relative_error, run_head, run_reference
from torch import Tensor

from adpa.kernels.losses import advantage_loss, topk_kl
from adpa.kernels.teacher_rows import teacher_rows

ON_GPU = TRITON_DEVICE == "cuda"
N, V, d, K, CHUNK_ROWS = (2000, 32_003, 256, 50, 512) if ON_GPU else (11, 301, 16, 5, 4)
# bfloat16 rounds a logit near 1 by up to 0.002; Triton's interpreter does not round, it cuts off.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2 if ON_GPU else 4e-2}
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, a tensor that was not written holds NaN."""
    if ON_GPU:
        torch.cuda.empty_cache()
        # The allocator hands out the smallest block that fits, and has other ones for less than 1 MiB.
        blocks = [torch.full((size,), math.nan, device="cuda") for size in (*[2**14] * 500, *[2**20] * 50, 2**29)]
        del blocks
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fresh_problem(dtype: torch.dtype) -> Problem:
    """Other numbers in each run of the tests; the seed is printed if a test fails. Logits are near 1."""
    seed = torch.seed() % 2**32
    print("seed", seed)
    return random_problem(N, V, d, K, dtype=dtype, scale=d**-0.5, seed=seed)


def fresh_logits(dtype: torch.dtype) -> tuple[Problem, Tensor]:
    """A problem, and its logits on Triton's device."""
    problem = fresh_problem(dtype)
    return problem, (problem.hidden @ problem.weight.T).detach().to(TRITON_DEVICE)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_a_gpu_hands_out_the_poison() -> None:
    with poisoned_memory():
        for size in (100, 2**14, 2**20, 2**28):
            assert torch.empty(size, device="cuda").isnan().all()


@pytest.mark.skipif(ON_GPU, reason="torch fills memory on a CPU")
def test_a_cpu_hands_out_the_poison() -> None:
    with poisoned_memory():
        assert torch.empty(100).isnan().all()


@both_dtypes
@both_backends
def test_the_heads_losses_and_gradients_are_those_of_float64(backend: Backend, dtype: torch.dtype) -> None:
    problem = fresh_problem(dtype)
    expected = run_reference(problem)
    with poisoned_memory():
        actual = run_head(problem, backend, CHUNK_ROWS)
    assert relative_error(actual.terms, expected.terms) <= TOLERANCE[dtype]
    for gradient, expected_gradient in zip(actual.gradients, expected.gradients, strict=True):
        assert relative_error(gradient, expected_gradient) <= TOLERANCE[dtype]


@both_dtypes
def test_the_separate_losses_and_their_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    problem, logits_NV = fresh_logits(dtype)
    ids_NK, logprobs_NK, tail_N, advantages_NK = (tensor.to(TRITON_DEVICE) for tensor in problem[3:7])

    def results(logits_NV: Tensor, backend: Backend) -> tuple[Tensor, ...]:
        logits_NV = logits_NV.clone().requires_grad_()
        with poisoned_memory():
            kl_N = topk_kl(logits_NV, ids_NK, logprobs_NK, tail_N, backend=backend)
            advantage_N = advantage_loss(logits_NV, ids_NK, advantages_NK, backend=backend)
            kl_gradient_NV, advantage_gradient_NV = (
                torch.autograd.grad(loss_N.sum(), logits_NV)[0] for loss_N in (kl_N, advantage_N)
            )
        return kl_N.detach(), advantage_N.detach(), kl_gradient_NV, advantage_gradient_NV

    exact = results(logits_NV.double(), "torch")
    for actual, expected in zip(results(logits_NV, "triton"), exact, strict=True):
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


@both_dtypes
def test_the_teachers_rows_are_those_of_the_torch_backend(dtype: torch.dtype) -> None:
    problem, logits_NV = fresh_logits(dtype)
    expected = teacher_rows(logits_NV, problem.labels, K, backend="torch")
    with poisoned_memory():
        actual = teacher_rows(logits_NV, problem.labels, K, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

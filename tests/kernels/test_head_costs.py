"""What the head holds, computes and refuses.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

from collections import Counter
from typing import Any

import pytest
import torch
from tests.kernels.oracle import Problem, logits_of, oracle_losses, random_problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adpa.errors import OptionError
from adpa.kernels.head import distill_head

CHUNKS = 8  # of 8 rows each


class Watch(TorchDispatchMode):
    """Counts the operations that run, and keeps the size of the largest tensor they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result

    @property
    def matrix_products(self) -> int:
        return self.operations["mm"] + self.operations["addmm_"]


def step(problem: Problem) -> Watch:
    with Watch() as watch:
        loss, _ = distill_head(*problem, chunk_rows=8)
        if loss.requires_grad:
            loss.backward()
    return watch


def wide_problem(**options: Any) -> Problem:
    return random_problem(N=64, V=4001, d=4, K=10, **options)


def frozen(tensor: Tensor) -> Tensor:
    return tensor.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_tensor_is_larger_than_a_chunk_of_logits(dtype: torch.dtype, softcap: float | None) -> None:
    problem = wide_problem(dtype=dtype, bias=True)._replace(softcap=softcap)
    assert step(problem).largest == 8 * 4001 * 4


def test_the_host_waits_once_for_the_rows_that_count() -> None:
    operations = step(wide_problem()).operations
    assert operations["nonzero"] == 1
    assert operations["_local_scalar_dense"] == operations["item"] == operations["equal"] == 0


def test_a_training_step_takes_three_matrix_products_a_chunk() -> None:
    assert step(wide_problem()).matrix_products == 3 * CHUNKS


def test_masked_rows_are_not_multiplied() -> None:
    problem = wide_problem()
    for row_weight in (problem.nll_weight, problem.kl_weight, problem.advantage_weight):
        row_weight[::2] = 0
    assert step(problem).matrix_products == 3 * CHUNKS // 2


def test_a_frozen_head_takes_two() -> None:
    problem = wide_problem()
    watch = step(problem._replace(weight=frozen(problem.weight)))
    assert watch.matrix_products == 2 * CHUNKS
    assert problem.hidden.grad is not None
    assert problem.weight.grad is None


def test_a_frozen_decoder_takes_two() -> None:
    problem = wide_problem()
    watch = step(problem._replace(hidden=frozen(problem.hidden)))
    assert watch.matrix_products == 2 * CHUNKS
    assert problem.weight.grad is not None
    assert problem.hidden.grad is None


def test_without_gradients_there_is_one_product_a_chunk_and_no_gradient_work() -> None:
    problem = wide_problem()
    with torch.no_grad():
        unrecorded = step(problem)
    constant = step(problem._replace(hidden=frozen(problem.hidden), weight=frozen(problem.weight)))
    assert unrecorded.matrix_products == constant.matrix_products == CHUNKS
    assert unrecorded.operations == constant.operations
    assert unrecorded.operations["mul_"] == 0


def test_no_grad_gives_the_same_losses() -> None:
    problem = random_problem()
    loss, terms = distill_head(*problem)
    with torch.no_grad():
        evaluated = distill_head(*problem)
    torch.testing.assert_close(evaluated, (loss.detach(), terms), rtol=0, atol=0)


def test_only_the_loss_carries_gradients() -> None:
    loss, terms = distill_head(*random_problem())
    assert loss.requires_grad
    assert not any(term_N.requires_grad for term_N in terms)


def test_the_upstream_gradient_scales_and_a_second_backward_adds_the_same_again() -> None:
    problem = random_problem()
    loss, _ = distill_head(*problem)
    parameters = (problem.hidden, problem.weight)
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(scaled, tuple(-2.5 * gradient for gradient in once), rtol=1e-6, atol=0)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_tied_embeddings_get_the_gradients_of_both_their_uses() -> None:
    problem = random_problem()
    embedding_Vd, inputs_N = problem.weight, problem.labels.flip(0)

    def gradient(embedding_of_inputs: Tensor, embedding_of_head: Tensor) -> Tensor:
        hidden_Nd = torch.tanh(embedding_of_inputs[inputs_N])
        loss, _ = distill_head(hidden_Nd, embedding_of_head, *problem[2:])
        return torch.autograd.grad(loss, embedding_Vd)[0]

    tied = gradient(embedding_Vd, embedding_Vd)
    through_inputs = gradient(embedding_Vd, frozen(embedding_Vd))
    through_head = gradient(frozen(embedding_Vd), embedding_Vd)
    torch.testing.assert_close(tied, through_inputs + through_head)

    logits_NV = logits_of(problem._replace(hidden=torch.tanh(embedding_Vd[inputs_N])))
    eager = torch.autograd.grad(oracle_losses(problem, logits_NV)[0], embedding_Vd)[0]
    torch.testing.assert_close(tied, eager, rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_bit_for_bit() -> None:
    problem = random_problem(N=200, V=1009, d=32, K=20, bias=True)

    def run() -> tuple[Tensor, ...]:
        loss, terms = distill_head(*problem, chunk_rows=64)
        assert problem.bias is not None
        return loss, *terms, *torch.autograd.grad(loss, (problem.hidden, problem.weight, problem.bias))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def test_autocast_changes_nothing() -> None:
    problem = random_problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distill_head(*problem)
        inside = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    outside = torch.autograd.grad(distill_head(*problem)[0], (problem.hidden, problem.weight))
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels has shape \[3\], expected \[11\]"),
        ({"advantages": torch.zeros(11, 4)}, r"advantages has shape \[11, 4\], expected \[11, 5\]"),
        ({"topk_ids": torch.zeros(11, dtype=torch.int64)}, r"topk_ids has shape \[11\], expected \[11, any\]"),
        ({"weight": torch.zeros(37, 9)}, r"weight has shape \[37, 9\], expected \[any, 8\]"),
        ({"bias": torch.zeros(36)}, r"bias has shape \[36\], expected \[37\]"),
        ({"weight": torch.zeros(37, 8).bfloat16()}, "weight is torch.bfloat16, expected torch.float32"),
        ({"topk_ids": torch.zeros(11, 5)}, "topk_ids is torch.float32, expected torch.int32 or torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        distill_head(*random_problem()._replace(**change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, "backend 'triton' is not in this version"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        distill_head(*random_problem(), **options)

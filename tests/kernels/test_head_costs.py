"""The memory and the operations of the head, and the arguments that it refuses.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

from collections import Counter
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from tests.kernels.oracle import (
    BACKENDS,
    TRITON_DEVICE,
    Backend,
    Problem,
    logits_of,
    oracle_losses,
    random_problem,
    run,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adpa.errors import OptionError
from adpa.kernels import loss_rows
from adpa.kernels.checks import takes_triton
from adpa.kernels.head import distill_head

CHUNKS = 8  # of 8 rows each
both_backends = pytest.mark.parametrize("backend", BACKENDS)


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


def step(problem: Problem, backend: Backend) -> Watch:
    with Watch() as watch:
        loss, _ = run(problem, backend, chunk_rows=8)
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
    assert step(problem, "torch").largest == 8 * 4001 * 4


def test_no_tensor_is_larger_than_a_chunk_of_aligned_logits() -> None:
    problem = wide_problem(bias=True)._replace(softcap=5.0)
    assert step(problem, "triton").largest == 8 * 4016 * 4


@both_backends
def test_the_host_waits_once_for_the_rows_that_count(backend: Backend) -> None:
    with Watch() as watch:  # of the forward pass: in the backward pass it looks at the upstream gradient on a CPU alone
        distill_head(*wide_problem(), chunk_rows=8, backend=backend)
    operations = watch.operations
    assert operations["nonzero"] == 1
    assert operations["_local_scalar_dense"] == operations["item"] == operations["equal"] == 0


@both_backends
def test_the_host_does_not_wait_where_it_knows_the_rows(backend: Backend) -> None:
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    with Watch() as watch:
        distill_head(*wide_problem(), chunk_rows=8, backend=backend, rows=torch.arange(64, device=device))
    assert not {"nonzero", "_local_scalar_dense", "item", "equal"} & watch.operations.keys()


@both_backends
def test_a_training_step_takes_three_matrix_products_a_chunk(backend: Backend) -> None:
    assert step(wide_problem(), backend).matrix_products == 3 * CHUNKS


@both_backends
def test_masked_rows_are_not_multiplied(backend: Backend) -> None:
    problem = wide_problem()
    for row_weight in (problem.nll_weight, problem.kl_weight, problem.advantage_weight):
        row_weight[::2] = 0
    assert step(problem, backend).matrix_products == 3 * CHUNKS // 2


@both_backends
def test_a_frozen_head_takes_two(backend: Backend) -> None:
    problem = wide_problem()
    watch = step(problem._replace(weight=frozen(problem.weight)), backend)
    assert watch.matrix_products == 2 * CHUNKS
    assert problem.hidden.grad is not None
    assert problem.weight.grad is None


@both_backends
def test_a_frozen_decoder_takes_two(backend: Backend) -> None:
    problem = wide_problem()
    watch = step(problem._replace(hidden=frozen(problem.hidden)), backend)
    assert watch.matrix_products == 2 * CHUNKS
    assert problem.weight.grad is not None
    assert problem.hidden.grad is None


@both_backends
def test_without_gradients_there_is_one_product_a_chunk_and_no_gradient_work(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = []
    loss_rows_ = loss_rows.loss_rows_

    def watched(*args: Any, with_gradient: bool, **options: Any) -> None:
        works.append(with_gradient)
        loss_rows_(*args, with_gradient=with_gradient, **options)

    monkeypatch.setattr(loss_rows, "loss_rows_", watched)
    problem = wide_problem()
    with torch.no_grad():
        unrecorded = step(problem, backend)
    constant = step(problem._replace(hidden=frozen(problem.hidden), weight=frozen(problem.weight)), backend)
    assert unrecorded.matrix_products == constant.matrix_products == CHUNKS
    assert unrecorded.operations == constant.operations
    assert unrecorded.operations["mul_"] == 0
    assert works == [False] * (2 * CHUNKS if backend == "triton" else 0)


@both_backends
def test_no_grad_gives_the_same_losses(backend: Backend) -> None:
    problem = random_problem()
    loss, terms = run(problem, backend)
    with torch.no_grad():
        evaluated = run(problem, backend)
    torch.testing.assert_close(evaluated, (loss.detach(), terms), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "sizes"), [(8, [8]), (9, [5, 4]), (17, [6, 6, 5]), (0, [0])])
def test_triton_cuts_rows_into_chunks_of_one_size(rows: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    actual = []
    monkeypatch.setattr(loss_rows, "loss_rows_", lambda logits_CV, *_, **__: actual.append(len(logits_CV)))
    run(random_problem(N=rows), "triton", chunk_rows=8)
    assert actual == sizes


def test_only_the_loss_carries_gradients() -> None:
    loss, terms = distill_head(*random_problem())
    assert loss.requires_grad
    assert not any(term_N.requires_grad for term_N in terms)


@both_backends
def test_the_upstream_gradient_scales_and_a_second_backward_adds_the_same_again(backend: Backend) -> None:
    problem = random_problem()
    loss, _ = run(problem, backend)
    parameters = (problem.hidden, problem.weight)
    once = torch.autograd.grad(loss, parameters, retain_graph=True)
    scaled = torch.autograd.grad(-2.5 * loss, parameters, retain_graph=True)
    again = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(scaled, tuple(-2.5 * gradient for gradient in once), rtol=1e-6, atol=0)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


@both_backends
def test_tied_embeddings_get_the_gradients_of_both_their_uses(backend: Backend) -> None:
    problem = random_problem()
    embedding_Vd, inputs_N = problem.weight, problem.labels.flip(0)

    def gradient(embedding_of_inputs: Tensor, embedding_of_head: Tensor) -> Tensor:
        hidden_Nd = torch.tanh(embedding_of_inputs[inputs_N])
        loss, _ = run(problem._replace(hidden=hidden_Nd, weight=embedding_of_head), backend)
        return torch.autograd.grad(loss, embedding_Vd)[0]

    tied = gradient(embedding_Vd, embedding_Vd)
    through_inputs = gradient(embedding_Vd, frozen(embedding_Vd))
    through_head = gradient(frozen(embedding_Vd), embedding_Vd)
    torch.testing.assert_close(tied, through_inputs + through_head)

    logits_NV = logits_of(problem._replace(hidden=torch.tanh(embedding_Vd[inputs_N])))
    eager = torch.autograd.grad(oracle_losses(problem, logits_NV)[0], embedding_Vd)[0]
    torch.testing.assert_close(tied, eager, rtol=1e-4, atol=1e-5)


@both_backends
def test_two_runs_are_equal_bit_for_bit(backend: Backend) -> None:
    problem = random_problem(N=70, V=1009, d=32, K=20, bias=True)

    def results() -> tuple[Tensor, ...]:
        loss, terms = run(problem, backend, chunk_rows=32)
        assert problem.bias is not None
        return loss, *terms, *torch.autograd.grad(loss, (problem.hidden, problem.weight, problem.bias))

    assert all(torch.equal(first, second) for first, second in zip(results(), results(), strict=True))


@both_backends
def test_autocast_changes_nothing(backend: Backend) -> None:
    problem = random_problem()
    with torch.autocast(TRITON_DEVICE if backend == "triton" else "cpu", torch.bfloat16):
        loss, _ = run(problem, backend)
        inside = torch.autograd.grad(loss, (problem.hidden, problem.weight))
    outside = torch.autograd.grad(run(problem, backend)[0], (problem.hidden, problem.weight))
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
        ({"weight": torch.zeros(37, 8, device="meta")}, "weight is on meta, expected cpu as hidden"),
        ({"advantages": torch.zeros(11, 5, device="meta")}, "advantages is on meta, expected cpu as hidden"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        distill_head(*random_problem()._replace(**change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend is 'cuda'; use 'auto', 'torch' or 'triton'"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"rows": torch.ones(11, dtype=torch.bool)}, "rows is torch.bool, expected torch.int64"),
        ({"rows": torch.zeros(1, 1, dtype=torch.int64)}, r"rows has shape \[1, 1\], expected \[any\]"),
        ({"rows": torch.zeros(1, dtype=torch.int64, device="meta")}, "rows is on meta, expected cpu as hidden"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        distill_head(*random_problem(), **options)


def test_more_ids_than_triton_takes_are_refused() -> None:
    problem = random_problem(V=1025, K=1025)
    with pytest.raises(OptionError, match=r"topk_ids has shape \[11, 1025\], backend 'triton' takes up to 1024 ids"):
        run(problem, "triton")


def test_without_triton_its_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpa.kernels.checks.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="backend 'triton' needs the package triton"):
        run(random_problem(), "triton")


def test_auto_takes_triton_where_it_can_run_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, on_cuda = torch.zeros(11, 8), MagicMock(is_cuda=True, device="cuda:0")
    few, many = (("topk_ids", torch.zeros(11, top_k)) for top_k in (50, 1025))
    assert not takes_triton("auto", "hidden", on_cpu, few)
    assert takes_triton("auto", "hidden", on_cuda, few)
    assert not takes_triton("auto", "hidden", on_cuda, many)
    monkeypatch.setattr("adpa.kernels.checks.find_spec", lambda name: None)
    assert not takes_triton("auto", "hidden", on_cuda, few)

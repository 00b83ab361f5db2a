"""The teacher's rows are those of float64, from either backend, for every row of logits a model can make.

Shapes: C rows, V vocabulary, K top tokens, J requested tokens.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tests.kernels.oracle import BACKENDS, TRITON_DEVICE, Backend
from tests.memory import peak_bytes
from torch import Tensor

from adpa.errors import OptionError
from adpa.kernels.teacher_rows import GROUP, TeacherRows, logprobs_at, teacher_rows

NAN, INF = math.nan, math.inf
both_backends = pytest.mark.parametrize("backend", BACKENDS)


class Rows(NamedTuple):
    """The arguments of `teacher_rows`."""

    logits: Tensor
    labels: Tensor
    top_k: int


Case = Callable[[], Rows]
CASES: list[Case] = []


def case(make: Case) -> Case:
    CASES.append(make)
    return make


def random_rows(C: int = 5, V: int = 300, K: int = 7, *, scale: float = 3.0, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    logits_CV = scale * torch.randn(C, V, generator=generator)
    return Rows(logits_CV, torch.randint(V, (C,), generator=generator), K)


def run(rows: Rows, backend: Backend) -> TeacherRows:
    """On the device that a backend needs; returned on the CPU."""
    actual = teacher_rows(on_device(rows.logits, backend), rows.labels, rows.top_k, backend=backend)
    return TeacherRows(*(column.cpu() for column in actual))


def run_at(logits_CV: Tensor, ids_CJ: Tensor, backend: Backend) -> Tensor:
    return logprobs_at(on_device(logits_CV, backend), ids_CJ, backend=backend).cpu()


def on_device(logits_CV: Tensor, backend: Backend) -> Tensor:
    return logits_CV.to(TRITON_DEVICE if backend == "triton" else "cpu")


def expected_rows(rows: Rows) -> TeacherRows:
    """One row at a time, in float64: sorted by (−logit, id), the tail summed over the rest."""
    own, ids, top, tail = [], [], [], []
    for logits_V, label in zip(rows.logits.double(), rows.labels.tolist(), strict=True):
        logprobs_V = logits_V.log_softmax(dim=0)
        values = logits_V.tolist()
        order = sorted(range(len(values)), key=lambda token: (-values[token], token))
        own.append(logprobs_V[label])
        ids.append(order[: rows.top_k])
        top.append(logprobs_V[order[: rows.top_k]])
        tail.append(logprobs_V[order[rows.top_k :]].logsumexp(dim=0))
    shape = (len(own), rows.top_k)
    return TeacherRows(
        own_logprobs=torch.tensor(own).double(),
        topk_ids=torch.tensor(ids).reshape(shape),
        topk_logprobs=torch.stack(top) if top else torch.empty(shape),
        tail_logprob=torch.tensor(tail).double(),
    )


def assert_same(actual: TeacherRows, expected: TeacherRows) -> None:
    assert actual.topk_ids.dtype == torch.int32
    assert actual.topk_ids.tolist() == expected.topk_ids.tolist()
    for name in ("own_logprobs", "topk_logprobs", "tail_logprob"):
        number = getattr(actual, name)
        assert number.dtype == torch.float32
        torch.testing.assert_close(number, getattr(expected, name).float(), rtol=1e-6, atol=2e-6)


@case
def an_ordinary_chunk() -> Rows:
    return random_rows()


@case
def a_wide_vocabulary() -> Rows:
    return random_rows(C=2, V=49_152, K=50)


def vocabulary_is(V: int) -> Case:
    def make() -> Rows:
        return random_rows(V=V, K=min(7, V))

    make.__name__ = f"the_vocabulary_has_{V}_tokens"
    return make


CASES += [vocabulary_is(V) for V in (1, 2, 37, GROUP, GROUP + 1, 64 * GROUP, 64 * GROUP + 1, 4097)]


def k_is(K: int) -> Case:
    def make() -> Rows:
        return random_rows(K=K)

    make.__name__ = f"k_is_{K}_of_300"
    return make


CASES += [k_is(K) for K in (1, 5, 64, 128, 299, 300)]


@case
def there_is_one_row() -> Rows:
    return random_rows(C=1)


@case
def there_are_no_rows() -> Rows:
    return random_rows(C=0)


@case
def all_logits_are_equal() -> Rows:
    return random_rows()._replace(logits=torch.full((5, 300), -2.5))


@case
def few_logits_are_different() -> Rows:
    rows = random_rows()
    return rows._replace(logits=rows.logits.round())


@case
def zeros_have_two_signs() -> Rows:
    rows = random_rows()
    zeros_CV = torch.where(rows.logits > 0, 0.0, -0.0)
    return rows._replace(logits=torch.where(rows.logits.abs() < 4, zeros_CV, -1))


@case
def all_groups_have_the_same_largest_logit() -> Rows:
    rows = random_rows(V=64 * GROUP + 5)
    rows.logits[:, 5::GROUP] = 20
    return rows


@case
def a_coarse_dtype_ties_across_groups() -> Rows:
    rows = random_rows(V=4097, K=300, scale=0.1)
    return rows._replace(logits=rows.logits.bfloat16())


@case
def the_best_tokens_are_neighbours() -> Rows:
    rows = random_rows()
    rows.logits[:, 100:107] += 30
    return rows


@case
def the_best_tokens_lie_far_apart() -> Rows:
    rows = random_rows()
    rows.logits[:, ::43] += 30
    return rows


@case
def the_teacher_is_certain() -> Rows:
    rows = random_rows(K=1)
    rows.logits[:, 17] += torch.tensor([20, 60, 120, 1000, 10_000])
    return rows


@case
def logits_reach_ten_thousand() -> Rows:
    rows = random_rows()
    return rows._replace(logits=rows.logits.sign() * 1e4 + torch.arange(300) % 3)


@case
def a_block_of_logits_is_minus_infinity() -> Rows:
    rows = random_rows()
    rows.logits[:, 60:200] = -INF
    return rows


@case
def only_three_tokens_are_possible() -> Rows:
    rows = random_rows()
    keep_V = torch.zeros(300, dtype=torch.bool).index_fill(0, torch.tensor([5, 100, 299]), True)
    return rows._replace(logits=rows.logits.where(keep_V, -INF))


def dtype_is(dtype: torch.dtype, V: int) -> Case:
    def make() -> Rows:
        rows = random_rows(V=V)
        return rows._replace(logits=rows.logits.to(dtype))

    make.__name__ = f"the_logits_are_{str(dtype).removeprefix('torch.')}_and_{V}"
    return make


CASES += [dtype_is(dtype, V) for dtype in (torch.bfloat16, torch.float16) for V in (256, 300)]


@case
def labels_are_int32() -> Rows:
    rows = random_rows()
    return rows._replace(labels=rows.labels.int())


@case
def the_logits_lie_column_by_column() -> Rows:
    rows = random_rows()
    return rows._replace(logits=rows.logits.T.contiguous().T)


@case
def the_logits_and_labels_are_every_second_row() -> Rows:
    rows = random_rows(C=10)
    return rows._replace(logits=rows.logits[::2, 3:], labels=rows.labels[::2] % 297)


@both_backends
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_rows_are_those_of_float64_when(make: Case, backend: Backend) -> None:
    rows = make()
    expected = expected_rows(rows)
    actual = run(rows, backend)
    assert_same(actual, expected)
    ids_CJ = torch.cat([rows.labels[:, None], expected.topk_ids.to(rows.labels.dtype)], dim=1)
    at_CJ = run_at(rows.logits, ids_CJ, backend)
    torch.testing.assert_close(at_CJ[:, 0], actual.own_logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(at_CJ[:, 1:], actual.topk_logprobs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("values", [1, 2, 3, 4])
@pytest.mark.parametrize("V", [1, 2, 3, 7, 31, 64, 65, 127, 128, 129, 200, 399])
def test_among_equal_logits_the_smaller_id_goes_first(V: int, values: int) -> None:
    logits_CV = torch.randint(values, (3, V), generator=torch.Generator().manual_seed(V)).float()
    for top_k in {1, (V + 1) // 2, V}:
        rows = Rows(logits_CV, torch.zeros(3, dtype=torch.int64), top_k)
        assert_same(teacher_rows(*rows), expected_rows(rows))


EXTREMES = [-INF, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1 + 1e-7, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [63, 64, 700, 4100])
def test_the_top_k_is_that_of_a_stable_sort_whatever_the_logits(V: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(V)
    logits_CV = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (20, V), generator=generator)].to(dtype)
    logits_CV[10:, ::3] = 2.5
    order_CV = logits_CV.sort(dim=1, descending=True, stable=True).indices
    for top_k in (1, 5, V // 2, V):
        actual = teacher_rows(logits_CV, torch.zeros(20, dtype=torch.int32), top_k)
        assert torch.equal(actual.topk_ids.long(), order_CV[:, :top_k])


@both_backends
@pytest.mark.parametrize("column", [0, 150, 299])
@pytest.mark.parametrize("value", [NAN, -NAN, INF])
def test_what_is_not_a_number_makes_its_row_nan_and_no_other(value: float, column: int, backend: Backend) -> None:
    rows = random_rows()
    expected = run(rows, backend)
    rows.logits[2, column] = value
    actual = run(rows, backend)
    ids_C1 = rows.labels[:, None]
    for numbers in (actual.own_logprobs, actual.topk_logprobs, run_at(rows.logits, ids_C1, backend)):
        assert numbers[2].isnan().all()
    assert actual.tail_logprob[2].isnan()
    others = torch.tensor([0, 1, 3, 4])
    for actual_C, expected_C in zip(actual, expected, strict=True):
        assert torch.equal(actual_C[others], expected_C[others])


@both_backends
def test_a_row_of_nothing_but_minus_infinity_is_nan(backend: Backend) -> None:
    actual = run(Rows(torch.full((1, 300), -INF), torch.tensor([0]), 7), backend)
    assert actual.own_logprobs.isnan().all()
    assert actual.topk_logprobs.isnan().all()
    assert actual.tail_logprob.isnan().all()


@both_backends
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_ids_that_mean_nothing_are_in_the_vocabulary_all_the_same(value: float, backend: Backend) -> None:
    actual = run(Rows(torch.full((1, 300), value), torch.tensor([0]), 300), backend)
    assert actual.topk_ids.min() >= 0
    assert actual.topk_ids.max() < 300


@both_backends
def test_a_token_that_is_not_in_the_vocabulary_has_nan(backend: Backend) -> None:
    rows = random_rows(C=3)._replace(labels=torch.tensor([-100, 300, 299]))
    assert run(rows, backend).own_logprobs.isnan().tolist() == [True, True, False]
    ids_C3 = torch.tensor([[-1, 2**31, 0]] * 3)
    assert run_at(rows.logits, ids_C3, backend).isnan().tolist() == [[True, True, False]] * 3


@both_backends
def test_no_token_may_be_asked_for(backend: Backend) -> None:
    assert run_at(random_rows().logits, torch.empty(5, 0, dtype=torch.int64), backend).shape == (5, 0)


@both_backends
def test_the_logits_are_left_as_they_were_and_the_same_comes_twice(backend: Backend) -> None:
    rows = random_rows(C=3, V=4097, K=50)
    rows = rows._replace(logits=on_device(rows.logits, backend))
    before = rows.logits.clone()
    first, second = (run(rows, backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(rows.logits, before)


@both_backends
@pytest.mark.parametrize("bytes_of_block", [1, 100_000])
def test_a_row_does_not_depend_on_the_block_that_it_is_in(
    bytes_of_block: int, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(C=7, V=4097, K=20)
    ids_CJ = random_rows(C=7, V=4097, K=20).logits.argsort(dim=1)[:, :9]
    whole, whole_at = run(rows, backend), run_at(rows.logits, ids_CJ, backend)
    monkeypatch.setattr("adpa.kernels.teacher_rows.BLOCK_BYTES", bytes_of_block)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(rows, backend), strict=True))
    assert torch.equal(whole_at, run_at(rows.logits, ids_CJ, backend))


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("V", "K"), [(4097, 1), (49_152, 50), (50_001, 50), (8192, 1000), (2048, 2048), (151_936, 1), (151_936, 1000)]
)
def test_a_call_takes_no_more_memory_than_it_says(
    V: int, K: int, dtype: torch.dtype, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    C, limit = 24, 4 << 20
    logits_CV, ids_CK = random_rows(C, V).logits.to(dtype), torch.zeros(C, K, dtype=torch.int32)
    peaks_CG = torch.randn(C, -(-V // GROUP))
    # Triton's pass writes its result only, but the interpreter copies what it reads.
    result = lambda logits_CV, _: (peaks_CG[: len(logits_CV)].clone(), peaks_CG[: len(logits_CV)].clone())  # noqa: E731
    monkeypatch.setattr("adpa.kernels.group_rows.group_rows", result)
    monkeypatch.setattr("adpa.kernels.teacher_rows.BLOCK_BYTES", limit)
    result_bytes = C * (8 * K + 8)
    assert peak_bytes(lambda: teacher_rows(logits_CV, ids_CK[:, 0], K, backend)) <= limit + result_bytes
    assert peak_bytes(lambda: logprobs_at(logits_CV, ids_CK, backend)) <= limit + result_bytes


def test_no_gradient_is_recorded() -> None:
    logits_CV, labels_C, top_k = random_rows()
    logits_CV.requires_grad_()
    assert not any(column.requires_grad for column in teacher_rows(logits_CV, labels_C, top_k))
    assert not logprobs_at(logits_CV, labels_C[:, None]).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(300)}, r"logits has shape \[300\], expected \[any, any\]"),
        ({"logits": torch.zeros(5, 0)}, r"logits has shape \[5, 0\], expected at least 1 column"),
        ({"logits": torch.zeros(5, 300).double()}, "logits is torch.float64, expected torch.float32 or"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels has shape \[4\], expected \[5\]"),
        ({"labels": torch.zeros(5)}, "labels is torch.float32, expected torch.int32 or torch.int64"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 300"),
        ({"top_k": 301}, "top_k is 301, expected 1 to 300"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        teacher_rows(*random_rows()._replace(**change))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), r"ids has shape \[4, 2\], expected \[5, any\]"),
        (torch.zeros(5, 2), "ids is torch.float32, expected torch.int32 or torch.int64"),
    ],
)
def test_ids_that_do_not_fit_are_refused_by_name(ids: Tensor, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        logprobs_at(random_rows().logits, ids)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(OptionError, match="backend is 'cuda'; use 'auto', 'torch' or 'triton'"):
        teacher_rows(*random_rows(), backend="cuda")  # type: ignore[arg-type]


def test_a_machine_without_triton_takes_torch_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert_same(teacher_rows(*random_rows()), expected_rows(random_rows()))
    with pytest.raises(OptionError, match="needs the package triton; install it or use"):
        teacher_rows(*random_rows(), backend="triton")

"""Variable-length attention: the reference against its definition, torch's function on a GPU."""

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from adpa.errors import ModelError
from adpa.pipeline.models.varlen_attention import OPTIONS, compare_varlen, find_varlen, varlen_reference

CPU = torch.device("cpu")


def starts(lengths: list[int], device: torch.device = CPU) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=5)
WINDOWS = st.sampled_from([(-1, -1), (-1, 0), (0, 0), (1, 0), (4, 0), (2, 1), (99, 0)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LENGTHS, WINDOWS, st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.sampled_from([None, 0.7]))
def test_the_reference_is_sdpa_of_each_sequence(
    lengths: list[tuple[int, int]], window: tuple[int, int], heads: tuple[int, int], scale: float | None
) -> None:
    """Queries are the last of a sequence's places; a window (w, 0) is the w places before a query's, and its own."""
    queries, keys = [own for own, _ in lengths], [own + shared for own, shared in lengths]
    generator = torch.Generator().manual_seed(sum(keys))
    query, key, value = (
        torch.randn(sum(counts), number, 8, generator=generator, dtype=torch.float64)
        for counts, number in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    )
    actual = varlen_reference(
        query,
        key,
        value,
        starts(queries),
        starts(keys),
        max(queries),
        max(keys),
        scale=scale,
        window_size=window,
        enable_gqa=heads[0] != heads[1],
    )
    expected = []
    for own, whole, each_query, each_key, each_value in zip(
        queries, keys, query.split(queries), key.split(keys), value.split(keys), strict=True
    ):
        seen = [
            [
                (window[0] < 0 or place - other <= window[0]) and (window[1] < 0 or other - place <= window[1])
                for other in range(whole)
            ]
            for place in range(whole - own, whole)
        ]
        output = torch.nn.functional.scaled_dot_product_attention(
            each_query.transpose(0, 1)[None],
            each_key.transpose(0, 1)[None],
            each_value.transpose(0, 1)[None],
            attn_mask=torch.tensor(seen),
            scale=scale,
            enable_gqa=True,
        )
        expected.append(output[0].transpose(0, 1))
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-12, atol=1e-12)


def test_the_last_query_sees_the_last_key() -> None:
    """So that a response sees the whole prompt, which is elsewhere in the row."""
    value = torch.eye(5, dtype=torch.float64)[:, None]
    zeros = torch.zeros(5, 1, 5, dtype=torch.float64)
    arguments: Any = (zeros[:2], zeros, value, starts([2]), starts([5]), 2, 5)
    causal = varlen_reference(*arguments, window_size=(-1, 0))[:, 0]
    assert causal.tolist() == [[0.25, 0.25, 0.25, 0.25, 0], [0.2, 0.2, 0.2, 0.2, 0.2]]
    window_of_two = varlen_reference(*arguments, window_size=(1, 0))[:, 0]
    assert window_of_two.tolist() == [[0, 0, 0.5, 0.5, 0], [0, 0, 0, 0.5, 0.5]]


def test_the_reference_takes_what_torchs_function_takes() -> None:
    ours, torchs = (inspect.signature(each).parameters for each in (varlen_reference, varlen_attn))
    assert ours.keys() <= torchs.keys()
    assert all((ours[name].kind, ours[name].default) == (torchs[name].kind, torchs[name].default) for name in ours)
    assert ours.keys() > OPTIONS


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], torch.device]:
    """Makes torch one for CUDA, with a GPU of a compute capability."""

    def install(capability: tuple[int, int]) -> torch.device:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return torch.device("cuda:0")

    return install


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0)])
def test_the_widest_heads_have_no_backward_pass_on_some_gpus(
    capability: tuple[int, int], gpu: Callable[[tuple[int, int]], torch.device]
) -> None:
    device = gpu(capability)
    assert find_varlen(device, torch.bfloat16, 192) is varlen_attn
    assert find_varlen(device, torch.bfloat16, 200) is None


def test_a_torch_without_flash_attention_has_no_such_function(
    gpu: Callable[[tuple[int, int]], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gpu((9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert find_varlen(device, torch.bfloat16, 64) is None


def test_torchs_function_is_found_for_half_precision_on_a_gpu_that_has_it(
    gpu: Callable[[tuple[int, int]], torch.device],
) -> None:
    device = gpu((9, 0))
    for width in (8, 64, 80, 128, 256):
        assert find_varlen(device, torch.bfloat16, width) is varlen_attn
    assert find_varlen(device, torch.float16, 64) is varlen_attn
    for dtype in (torch.float32, torch.float64):
        assert find_varlen(device, dtype, 64) is None
    for width in (4, 60, 264, 512):
        assert find_varlen(device, torch.bfloat16, width) is None
    assert find_varlen(CPU, torch.bfloat16, 64) is None
    assert find_varlen(gpu((8, 0)), torch.bfloat16, 64) is varlen_attn
    assert find_varlen(gpu((7, 5)), torch.bfloat16, 64) is None


def test_a_torch_whose_function_lacks_an_option_has_none(
    gpu: Callable[[tuple[int, int]], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(query: Tensor, *, is_causal: bool = False, scale: float | None = None) -> Tensor:
        return query

    device = gpu((9, 0))
    monkeypatch.setattr("adpa.pipeline.models.varlen_attention.varlen_attn", older)
    assert find_varlen(device, torch.bfloat16, 64) is None


def test_a_torch_for_another_makers_gpus_has_none(
    gpu: Callable[[tuple[int, int]], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = gpu((9, 4))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_varlen(device, torch.bfloat16, 64) is None


def kernel(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """The result of a good kernel: exact sums, rounded."""
    return varlen_reference(query.double(), key.double(), value.double(), *arguments, **options).to(query.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_a_good_kernel_passes_the_comparison(heads: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    compare_varlen(kernel, CPU, dtype, heads, groups, 16)
    assert torch.equal(torch.get_rng_state(), state)


def first_sees_first(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Causal attention of the other alignment: the first query sees the first key alone."""
    cu_seq_q, cu_seq_k, max_q, max_k = arguments
    ends = cu_seq_k[:-1] + cu_seq_q.diff()
    kept = torch.cat([torch.arange(int(a), int(b)) for a, b in zip(cu_seq_k[:-1], ends, strict=True)])
    return kernel(query, key[kept], value[kept], cu_seq_q, cu_seq_q, max_q, max_k, **options)


def one_more(*arguments: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    before, after = window_size
    return kernel(*arguments, window_size=(before + 1 if before >= 0 else before, after), **options)


def no_window(*arguments: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return kernel(*arguments, window_size=(-1, window_size[1]), **options)


def all_see_all(*arguments: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
    return kernel(*arguments, window_size=(-1, -1), **options)


def own_scale(*arguments: Any, scale: float, **options: Any) -> Tensor:
    return kernel(*arguments, **options)


def groups_in_turn(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    return kernel(query, key.repeat(1, repeats, 1), value.repeat(1, repeats, 1), *arguments, **options)


@pytest.mark.parametrize("wrong", [first_sees_first, one_more, no_window, all_see_all, own_scale, groups_in_turn])
def test_a_kernel_that_computes_something_else_is_refused(wrong: Callable[..., Tensor]) -> None:
    with pytest.raises(ModelError, match=r"varlen_attn is wrong on cpu; leave out --packing"):
        compare_varlen(wrong, CPU, torch.bfloat16, 4, 2, 16)


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_varlen(torch.device("cuda"), torch.bfloat16, 64) is None, reason="needs a GPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, 0), (0, 0), (3, 0), (127, 0), (4095, 0)])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (14, 2, 64), (8, 1, 128), (4, 2, 80), (4, 2, 256)])
def test_a_gpu_has_the_values_and_gradients_of_the_reference(
    heads: int, groups: int, width: int, window: tuple[int, int], dtype: torch.dtype
) -> None:
    device = torch.device("cuda")
    queries, keys = [1, 300, 3, 64, 129], [1, 300, 200, 65, 1000]
    generator = torch.Generator().manual_seed(width)
    inputs = [
        torch.randn(sum(lengths), count, width, generator=generator).to(device, dtype).requires_grad_()
        for lengths, count in ((queries, heads), (keys, groups), (keys, groups))
    ]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    upstream = torch.randn(sum(queries), heads, width, generator=generator).to(device, dtype)
    layout = (starts(queries, device), starts(keys, device), max(queries), max(keys))
    options = {"scale": 0.1, "window_size": window, "enable_gqa": heads != groups}
    functions: tuple[Callable[..., Any], ...] = (varlen_attn, varlen_reference)
    actual, expected = (
        function(*each, *layout, **options) for function, each in zip(functions, (inputs, exact), strict=True)
    )
    tolerance = torch.finfo(dtype).eps ** (2 / 3)
    assert (actual - expected).abs().amax() <= tolerance * expected.abs().amax()
    gradients = torch.autograd.grad(actual, inputs, upstream)
    exact_gradients = torch.autograd.grad(expected, exact, upstream.double())
    for gradient, exact_gradient in zip(gradients, exact_gradients, strict=True):
        assert (gradient - exact_gradient).norm() <= tolerance * exact_gradient.norm()

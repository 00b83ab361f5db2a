"""Checks of the arguments of this folder's public functions."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from adpa.errors import OptionError

Backend = Literal["auto", "torch", "triton"]


def check_shape(name: str, tensor: Tensor | None, *expected: int | None) -> None:
    """Raises OptionError if a tensor has other sizes than expected; None is any size. A missing tensor passes."""
    if tensor is None:
        return
    shape = list(tensor.shape)
    if len(shape) != len(expected) or any(e not in (None, f) for e, f in zip(expected, shape, strict=True)):
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise OptionError(f"{name} has shape {shape}, expected [{sizes}]")


def check_dtype(name: str, tensor: Tensor | None, *expected: torch.dtype) -> None:
    """Raises OptionError if a tensor has none of the expected dtypes. A missing tensor passes."""
    if tensor is not None and tensor.dtype not in expected:
        raise OptionError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, expected))}")


def check_device(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """Raises OptionError if a tensor is on another device than `other`. A missing tensor passes."""
    if tensor is not None and tensor.device != other.device:
        raise OptionError(f"{name} is on {tensor.device}, expected {other.device} as {other_name}")


def check_ids(name: str, ids: Tensor, *expected: int | None) -> None:
    """Raises OptionError unless the ids are integers of the expected sizes."""
    check_shape(name, ids, *expected)
    check_dtype(name, ids, torch.int32, torch.int64)


def check_logits(logits: Tensor, *expected: torch.dtype) -> None:
    """Raises OptionError unless the logits are a matrix of one of the dtypes, with at least one column."""
    check_shape("logits", logits, None, None)
    check_dtype("logits", logits, *expected)
    if logits.shape[1] == 0:
        raise OptionError(f"logits has shape {list(logits.shape)}, expected at least 1 column")


def takes_triton(backend: str, name: str, tensor: Tensor, ids: tuple[str, Tensor] | None = None) -> bool:
    """Whether to compute with Triton: "auto" uses Triton on CUDA if it can.

    Args:
        backend: the user's choice.
        name: the name of the argument `tensor`.
        tensor: the tensor on whose device the computation runs.
        ids: for the row kernel, name and value of the [N, K] ids; it limits K.

    Raises:
        OptionError: the backend is unknown, or it is "triton" and cannot run with these arguments or on this machine.
    """
    if backend not in ("auto", "torch", "triton"):
        raise OptionError(f"backend is {backend!r}", "use 'auto', 'torch' or 'triton'")
    if backend == "torch" or (backend == "auto" and not tensor.is_cuda):
        return False
    obstacle = _obstacle(name, tensor, ids)
    if obstacle and backend == "triton":
        raise obstacle
    return obstacle is None


def _obstacle(name: str, tensor: Tensor, ids: tuple[str, Tensor] | None) -> OptionError | None:
    if find_spec("triton") is None:
        return OptionError("backend 'triton' needs the package triton", "install it or use backend='torch'")
    import triton

    if not (tensor.is_cuda or triton.knobs.runtime.interpret):
        return OptionError(
            f"{name} is on {tensor.device}, backend 'triton' runs on CUDA",
            "use backend='torch', or in a test set TRITON_INTERPRET=1 before Python starts",
        )
    if ids is not None:
        from adpa.kernels.loss_rows import MAX_TOP_K

        ids_name, ids_NK = ids
        if ids_NK.shape[1] > MAX_TOP_K:
            return OptionError(
                f"{ids_name} has shape {list(ids_NK.shape)}, backend 'triton' takes up to {MAX_TOP_K} ids",
                "use backend='torch'",
            )
    return None

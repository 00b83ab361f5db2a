"""The loss head of every objective: the student's losses and their gradients, without the [N, V] logits in memory.

Source of the losses: Gao, Wan, Guo, Quan, Wang, "Advantage-Guided Distillation for Preference Alignment in
Small Language Models", ICLR 2025 (arXiv 2502.17927). `adpa.kernels.reference` defines them in a few lines of
dense float64; this module computes the same.

One row has logits z [V], the student's q = softmax(z), a label y, and from the teacher K token ids S with
probabilities p_k and advantages A_k, and the probability p_T of all other tokens. Write q_T = Σ_{j∉S} q_j,
P = Σ_S p_k + p_T (float16 leaves it near 1, not at 1) and Ā = Σ_S q_k A_k. Then

    term       value                                                  ∂/∂z_j, j in S     ∂/∂z_j, j not in S
    NLL        −log q_y                                               q_j − 1[j=y]       q_j − 1[j=y]
    KL         Σ_S p_k(log p_k − log q_k) + p_T(log p_T − log q_T)    P·q_j − p_j        P·q_j − p_T·q_j/q_T
    advantage  −Σ_S q_k A_k                                           q_j(Ā − A_j)       q_j·Ā

Let T, the tail, be one more outcome with A_T = 0. Its gradient has the form of the middle column, and a token
outside S gets the share q_j/q_T of it. So the gradient of a row is K + 1 numbers, one multiple of the softmax over
the tail, and the label's −1. A chunk of logits becomes its gradient in place: replace the K logits by −inf,
exponentiate, sum, multiply by one number per row, write the K gradients. The sum gives log q_T with all its digits,
where 1 − Σ_S q_k has none left at q_T ~ 1e-7.

The loss is linear in the upstream gradient, so all gradients are computed in the forward pass.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids, 3 terms.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adpa.errors import OptionError
from adpa.kernels import torch_head
from adpa.kernels.checks import Backend, check_device, check_dtype, check_ids, check_shape, takes_triton
from adpa.kernels.targets import Targets, select_targets


class HeadLosses(NamedTuple):
    """The terms of each row, [N] each, unweighted and detached; 0 where the weight of a term is 0."""

    nll: Tensor
    kl: Tensor
    advantage: Tensor


def distill_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    topk_ids: Tensor,
    teacher_logprobs: Tensor,
    tail_logprob: Tensor,
    advantages: Tensor,
    nll_weight: Tensor,
    kl_weight: Tensor,
    advantage_weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: Backend = "auto",
    chunk_rows: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, HeadLosses]:
    """Σ_n nll_weight·NLL + kl_weight·KL + advantage_weight·advantage, differentiable.

    The logits are `logit_scale * (hidden @ weight.T + bias)`; with a softcap they become
    `softcap * tanh(logits / softcap)`. All arguments but hidden, weight and bias are constants.

    What counts:
        - A row whose weights are all 0 is left out before the matrix product: nothing in it, NaN included,
          reaches the result. If one weight is 0, the inputs of that term do not reach the result.
        - A label outside [0, V), such as −100, makes the row's NLL weight 0.
        - A negative id is padding: the id and its probability are ignored. An id ≥ V, or a repeated id of the
          row, is not in S either, but its probability is added to the tail's.
        - The probabilities are used as they are, never renormalised; 0·log 0 = 0.
        - If S is the whole vocabulary, the tail has no outcome, and its term is left out.
        - An advantage that is not finite counts as 0: one of the models excludes the token.

    Args:
        hidden: [N, d] float32, bfloat16, float16 or float64. Matrix products run in this dtype, also under
            autocast; losses and sums over rows in float32 (float64 for float64).
        weight: [V, d], the dtype of hidden.
        labels: [N] int32 or int64.
        topk_ids: [N, K] int32 or int64; K may be 0, or exceed V through padding.
        teacher_logprobs: [N, K] log p_k, natural logarithm; −inf allowed.
        tail_logprob: [N] log p_T; −inf for an empty tail.
        advantages: [N, K] A_k, the teacher's log-probability minus the reference's.
        nll_weight: [N], as are kl_weight and advantage_weight; 0 = the row has no such term.
        bias: [V] or None.
        softcap: bound of the logits (Gemma); None or 0 = none.
        logit_scale: factor of the logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        backend: "torch" runs anywhere, "triton" on CUDA; "auto" uses Triton on CUDA, unless K > 1,024,
            and torch elsewhere.
        chunk_rows: rows whose logits are in memory at once; default: 4,096 in Triton and 256 in torch. Triton holds
            `chunk_rows · V` numbers of the dtype of hidden. torch holds that many in float32, half as much again for
            bfloat16 and float16, and twice as much for a softcap.
        rows: [M] int64, the rows that count, each once; all others are left out. Default: the rows with a nonzero
            weight; then the host waits for a GPU once per call, to learn their number.

    Returns:
        The loss, a float32 scalar (float64 for float64), and the losses of each row in the same dtype.

    Raises:
        OptionError: shapes, dtypes or devices do not fit together, or the backend cannot run here or with these
            arguments.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise OptionError(f"chunk_rows is {chunk_rows}, a chunk has at least 1 row")
    check_shape("hidden", hidden, None, None)
    check_shape("weight", weight, None, hidden.shape[1])
    check_shape("bias", bias, len(weight))
    check_ids("topk_ids", topk_ids, len(hidden), None)
    check_ids("labels", labels, len(hidden))
    columns = {
        "labels": labels,
        "tail_logprob": tail_logprob,
        "nll_weight": nll_weight,
        "kl_weight": kl_weight,
        "advantage_weight": advantage_weight,
    }
    tables = {"topk_ids": topk_ids, "teacher_logprobs": teacher_logprobs, "advantages": advantages}
    for name, column in columns.items():
        check_shape(name, column, len(hidden))
    for name, table in tables.items():
        check_shape(name, table, *topk_ids.shape)
    check_dtype("hidden", hidden, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    check_dtype("weight", weight, hidden.dtype)
    check_dtype("bias", bias, hidden.dtype)
    for name, tensor in {"weight": weight, "bias": bias, **columns, **tables}.items():
        check_device(name, tensor, "hidden", hidden)
    module: ModuleType = torch_head
    if takes_triton(backend, "hidden", hidden, ("topk_ids", topk_ids)):
        from adpa.kernels import triton_head

        module = triton_head

    if rows is not None:
        check_shape("rows", rows, None)
        check_dtype("rows", rows, torch.int64)
        check_device("rows", rows, "hidden", hidden)

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        weights_N3 = torch.stack([w.to(dtype) for w in (nll_weight, kl_weight, advantage_weight)], dim=1)
        rows_M, targets = select_targets(
            len(weight), labels, topk_ids, teacher_logprobs, tail_logprob, advantages, weights_N3, rows
        )
    needs_gradient = tuple(
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    with torch.autocast(hidden.device.type, enabled=False):
        loss, losses_N3 = _Head.apply(
            module.losses_and_gradients,
            hidden,
            weight,
            bias,
            rows_M,
            targets,
            softcap,
            logit_scale,
            chunk_rows or module.CHUNK_ROWS,
            needs_gradient,
        )
    return loss, HeadLosses(*losses_N3.unbind(dim=1))


class _Head(torch.autograd.Function):
    """Computes the gradients with the losses; its backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        losses_and_gradients: Any,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        bias_V: Tensor | None,
        rows_M: Tensor,
        targets: Targets,
        softcap: float | None,
        logit_scale: float,
        chunk_rows: int,
        needs_gradient: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        losses_N3, gradients = losses_and_gradients(
            hidden_Nd,
            weight_Vd,
            bias_V,
            rows_M,
            targets,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_rows=chunk_rows,
            needs_gradient=needs_gradient,
        )
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(losses_N3)
        return (targets.weights * losses_N3[rows_M]).sum(), losses_N3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        # A plain `loss.backward()` needs no copy. On a GPU, the host would have to wait to check for it.
        if upstream.is_cuda or upstream != 1:
            gradients = [None if gradient is None else gradient * upstream for gradient in gradients]
        return (None, *gradients, None, None, None, None, None, None)

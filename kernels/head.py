"""One loss head for every objective: the student's losses and their gradients without the [N, V] logits.

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

Let T be one more outcome with A_T = 0. A gradient by its logit has the form of the middle column, and a token
outside S receives of it the share q_j/q_T: beside the label's −1, a row's gradient is K+1 numbers and one
multiple of the softmax over the tail. So a chunk of logits is turned into its gradient in place: take out the
K logits and leave −inf, exponentiate, sum (that gives log q_T with all its digits, where 1 − Σ_S q_k has none
left at q_T ~ 1e-7), multiply by one number a row, put the K numbers back.

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
    """The terms of each row, [N] each, before their weights and detached; 0 where a term's weight is 0."""

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

    The logits are `logit_scale * (hidden @ weight.T + bias)`, and with a softcap
    `softcap * tanh(logits / softcap)` of these. All but hidden, weight and bias are constants.

    What counts:
        - A row whose weights are all 0 is left out before the matrix product: nothing in it, NaN included,
          reaches the result. Where one weight is 0, no input of that term does.
        - A label outside [0, V), such as −100, makes the row's NLL weight 0.
        - A negative id is padding: neither it nor its probability is there. An id ≥ V, or one that stood in
          the row before, is not in S either, but its probability is added to the tail's.
        - The probabilities are taken as they are, never renormalised; 0·log 0 = 0.
        - If S is the whole vocabulary, no outcome is left for the tail, and its term is left out.
        - An advantage that is not finite counts as 0: nothing can be learned from a token one model excludes.

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
        backend: "torch" runs anywhere, "triton" on CUDA; "auto" takes Triton on CUDA, unless K > 1,024,
            and torch elsewhere.
        chunk_rows: rows whose logits are held at a time; None for 4,096 in Triton and 256 in torch. Triton holds
            `chunk_rows · V` numbers of the dtype of hidden; torch that many in float32, half as much again for
            bfloat16 and float16, and twice as much for a softcap.
        rows: [M] int64, the rows that count, each once; all others are left out. None for the rows that have a weight
            that is not 0: then the host waits for a GPU to learn how many they are, once in a call.

    Returns:
        The loss, a float32 scalar (float64 for float64), and the losses of each row in the same dtype.

    Raises:
        OptionError: shapes, dtypes or devices that do not fit together, or a backend that cannot run here or not
            with these.
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
        # A plain `loss.backward()` needs no copy; on a GPU the host would have to wait for the look.
        if upstream.is_cuda or upstream != 1:
            gradients = [None if gradient is None else gradient * upstream for gradient in gradients]
        return (None, *gradients, None, None, None, None, None, None)

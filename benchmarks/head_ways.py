"""The heads that `benchmarks.head` compares: ours, eager losses, bare matrix products, and other fused heads.

A `Way` is a function from inputs to a loss. Its backward pass computes the gradients of hidden states and weight. Most
peers compute the NLL alone, which is less work than our losses; their names say so.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adpa.kernels.head import distill_head

OURS, PRODUCTS, EAGER, LIGER = "adpa", "three products", "eager", "Liger, NLL only"
# Liger's default, 1, makes chunks of about N·d/V rows.
LIGER_DEFAULT, *LIGER_CHUNKS = (f"{LIGER}, chunk ×{factor}" for factor in (1, 4, 8, 16, 32))
IGNORED = -100
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass(frozen=True)
class Case:
    """The shape of a step. ``share`` is the share of the rows with nonzero weights."""

    N: int
    V: int
    d: int
    K: int
    share: float = 1.0
    with_dX: bool = True  # noqa: N815


SMALL = Case(64, 512, 64, 4)


@dataclass(frozen=True)
class Inputs:
    """Random arguments for ``distill_head``. ``weight`` requires gradients, and so does ``hidden`` with dX."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    topk_ids: Tensor
    teacher_logprobs: Tensor
    tail_logprob: Tensor
    advantages: Tensor
    nll_weight: Tensor
    kl_weight: Tensor
    advantage_weight: Tensor


Way = Callable[[Inputs], Tensor]


def random_inputs(case: Case, device: str, dtype: torch.dtype, seed: int) -> Inputs:
    """Inputs of a case, different for each seed. A row outside the share has weights 0 and the label −100."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    first = torch.randint(case.V, (case.N, 1), generator=generator, device=device)
    gaps = torch.randint(1, case.V // case.K, (1, case.K), generator=generator, device=device)
    logprobs = (normal(case.N, case.K) - 0.1 * torch.arange(case.K, device=device)).log_softmax(1) - 0.05
    counts = torch.randperm(case.N, generator=generator, device=device) < round(case.share * case.N)
    weights = counts.float() / case.N
    return Inputs(
        hidden=normal(case.N, case.d).to(dtype).requires_grad_(case.with_dX),
        weight=(normal(case.V, case.d) / case.d**0.5).to(dtype).requires_grad_(),
        labels=torch.randint(case.V, (case.N,), generator=generator, device=device).where(counts, IGNORED),
        topk_ids=(first + gaps.cumsum(1)) % case.V,
        teacher_logprobs=logprobs,
        tail_logprob=torch.log1p(-logprobs.exp().sum(1)),
        advantages=normal(case.N, case.K),
        nll_weight=weights,
        kl_weight=weights,
        advantage_weight=weights,
    )


def adpa_head(inputs: Inputs) -> Tensor:
    """Our head, with all three losses."""
    return distill_head(**vars(inputs))[0]


def eager(inputs: Inputs) -> Tensor:
    """Logits in the inputs' dtype, losses in float32, the tail as 1 − Σq: the cheapest form in plain torch."""
    logq_NV = (inputs.hidden @ inputs.weight.T).float().log_softmax(1)
    nll_N = -logq_NV.gather(1, inputs.labels.clamp(min=0)[:, None]).squeeze(1)
    logq_NK = logq_NV.gather(1, inputs.topk_ids)
    tail_N = torch.log1p(-logq_NK.exp().sum(1).clamp(max=1 - 1e-6))
    p_NK, p_N = inputs.teacher_logprobs.exp(), inputs.tail_logprob.exp()
    kl_N = (p_NK * (inputs.teacher_logprobs - logq_NK)).sum(1) + p_N * (inputs.tail_logprob - tail_N)
    advantage_N = -(logq_NK.exp() * inputs.advantages).sum(1)
    return (inputs.nll_weight * nll_N + inputs.kl_weight * kl_N + inputs.advantage_weight * advantage_N).sum()


class _ThreeProducts(torch.autograd.Function):
    """The three products of any head without its losses. The logits stand in for their gradient in dX and dW."""

    @staticmethod
    def forward(ctx: Any, hidden_Nd: Tensor, weight_Vd: Tensor) -> Tensor:
        logits_NV = hidden_Nd @ weight_Vd.T
        ctx.save_for_backward(logits_NV @ weight_Vd, logits_NV.T @ hidden_Nd)
        return logits_NV[0, 0].float()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        return gradients


def three_products(inputs: Inputs) -> Tensor:
    """The floor: 6·N·V·d operations at the speed of the matrix library."""
    loss: Tensor = _ThreeProducts.apply(inputs.hidden, inputs.weight)
    return loss


def torch_chunked() -> Way:
    """PyTorch's own linear cross-entropy. It runs in chunks only if options are passed."""
    options = torch.nn.LinearCrossEntropyOptions()

    def way(inputs: Inputs) -> Tensor:
        head = torch.nn.functional.linear_cross_entropy
        return head(inputs.hidden, inputs.weight, inputs.labels, options=options)

    return way


def liger(factor: int) -> Callable[[], Way]:
    """Liger's fused linear cross-entropy, with chunks of ``factor`` times the default size."""

    def make() -> Way:
        module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
        head = module.LigerFusedLinearCrossEntropyFunction.apply
        # the defaults of liger-kernel 0.8.5 from bias to ce_mode; the next argument is the chunk's factor
        defaults = (None, None, IGNORED, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None)
        return lambda inputs: head(inputs.hidden, inputs.weight, inputs.labels, *defaults, factor)[0]

    return make


def liger_kl() -> Way:
    """Liger's KL to a dense target, made from the K ids; it has no tail."""
    loss = import_module("liger_kernel.transformers.fused_linear_kl_div").LigerFusedLinearKLDivLoss()

    def way(inputs: Inputs) -> Tensor:
        target_NV = inputs.hidden.new_zeros(len(inputs.hidden), len(inputs.weight))
        target_NV.scatter_(1, inputs.topk_ids, inputs.teacher_logprobs.exp().to(target_NV.dtype))
        return loss(inputs.hidden, inputs.weight, target_NV, inputs.labels)

    return way


def cut_cross_entropy() -> Way:
    """Apple's cut cross-entropy with its defaults, which skip small gradients."""
    head = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda inputs: head(inputs.hidden, inputs.weight, inputs.labels)


def veomni() -> Way:
    """VeOmni's NLL and top-k KL; the KL has no tail."""
    head = import_module("veomni.ops.kernels.cross_entropy.chunk_topk_distill").chunk_topk_distill_function

    def way(inputs: Inputs) -> Tensor:
        teacher = (inputs.topk_ids, inputs.teacher_logprobs)
        losses = head(inputs.hidden, inputs.weight, inputs.labels, *teacher, shift_labels=inputs.labels)
        return (inputs.kl_weight * losses[2] - inputs.nll_weight * losses[0]).sum()

    return way


PEERS: dict[str, Callable[[], Way]] = {
    "torch's chunked linear cross-entropy, NLL only": torch_chunked,
    **{name: liger(int(name.rpartition("×")[2])) for name in (LIGER_DEFAULT, *LIGER_CHUNKS)},
    "Liger, KL to a dense target only": liger_kl,
    "cut cross-entropy, NLL only": cut_cross_entropy,
    "VeOmni, NLL and KL without tail": veomni,
}


def step(way: Way, inputs: Inputs) -> None:
    """Computes loss and gradients, and drops the gradients."""
    way(inputs).backward()
    inputs.hidden.grad = inputs.weight.grad = None


def ways_on(device: str) -> tuple[dict[str, Way], dict[str, str]]:
    """The heads that can run one small step here, and for each other peer the reason why it cannot."""
    ways: dict[str, Way] = {OURS: adpa_head, PRODUCTS: three_products, EAGER: eager}
    missing = {}
    inputs = random_inputs(SMALL, device, DTYPES[device], seed=0)
    for name, make in PEERS.items():
        try:
            way = make()
            step(way, inputs)
        except Exception as error:  # another project's code may raise anything; it is reported
            missing[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            ways[name] = way
    return ways, missing

"""The losses of the head one row and one token at a time, independent of `adpa.kernels.reference`.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids, 3 terms (NLL, KL, advantage).
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from adpa.kernels.head import HeadLosses, distill_head

Backend = Literal["torch", "triton"]
BACKENDS: list[Backend] = ["torch", "triton"]
# Without a GPU, Triton's interpreter runs its kernels on a CPU; see tests/conftest.py.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Problem(NamedTuple):
    """The tensors of one call of the head, in the order of its arguments."""

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
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


def run(problem: Problem, backend: Backend, **options: Any) -> tuple[Tensor, HeadLosses]:
    """The head's result by a backend, on the device that this backend needs; returned on the CPU."""
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    there = Problem(*(value.to(device) if isinstance(value, Tensor) else value for value in problem))  # type: ignore[arg-type]
    loss, losses = distill_head(*there, backend=backend, **options)
    return loss.cpu(), HeadLosses(*(losses_N.cpu() for losses_N in losses))


def random_problem(
    N: int = 11,
    V: int = 37,
    d: int = 8,
    K: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    """A student and a teacher of random logits; hidden, weight and bias require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    teacher_NV = (2 * normal(N, V)).log_softmax(dim=1)
    topk = teacher_NV.topk(K, dim=1)
    rest_NV = teacher_NV.scatter(1, topk.indices, -torch.inf)
    return Problem(
        hidden=(scale * normal(N, d)).to(dtype).requires_grad_(),
        weight=normal(V, d).to(dtype).requires_grad_(),
        labels=torch.randint(V, (N,), generator=generator),
        topk_ids=topk.indices,
        teacher_logprobs=topk.values,
        tail_logprob=rest_NV.logsumexp(dim=1),
        advantages=normal(N, K),
        nll_weight=torch.rand(N, generator=generator),
        kl_weight=torch.rand(N, generator=generator),
        advantage_weight=torch.rand(N, generator=generator),
        bias=normal(V).to(dtype).requires_grad_() if bias else None,
    )


def problem_of_logits(logits_NV: Tensor) -> Problem:
    """A problem whose logits are exactly these: hidden is the logits, weight the identity."""
    N, V = logits_NV.shape
    problem = random_problem(N, V, d=V, K=min(5, V - 1))
    identity = torch.eye(V, dtype=logits_NV.dtype, requires_grad=True)
    hidden = logits_NV.clone().requires_grad_()
    return problem._replace(hidden=hidden, weight=identity)


def logits_of(problem: Problem) -> Tensor:
    """[N, V] in the dtype of the problem, as a model makes them."""
    logits_NV = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias) * problem.logit_scale
    if problem.softcap is None:
        return logits_NV
    return torch.tanh(logits_NV / problem.softcap) * problem.softcap


def oracle_losses(problem: Problem, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum and the losses [N, 3], in the dtype of the logits."""
    total = logits_NV[:0].sum()
    losses_N3 = logits_NV.new_zeros(len(logits_NV), 3)
    for n in range(len(logits_NV)):
        weights = [float(w[n]) for w in (problem.nll_weight, problem.kl_weight, problem.advantage_weight)]
        if not 0 <= int(problem.labels[n]) < logits_NV.shape[1]:
            weights[0] = 0.0
        terms = (_nll, _kl, _advantage)
        for index, (row_weight, term) in enumerate(zip(weights, terms, strict=True)):
            if row_weight != 0:
                value = term(problem, n, logits_NV[n].log_softmax(dim=0))
                losses_N3[n, index] = value.detach()
                total = total + row_weight * value
    return total, losses_N3


def _nll(problem: Problem, n: int, logq_V: Tensor) -> Tensor:
    return -logq_V[int(problem.labels[n])]


def _kl(problem: Problem, n: int, logq_V: Tensor) -> Tensor:
    p_of, moved = {}, 0.0
    logprobs = problem.teacher_logprobs[n].tolist()
    for token, logprob in zip(problem.topk_ids[n].tolist(), logprobs, strict=True):
        if token >= len(logq_V) or token in p_of:
            moved += math.exp(logprob)
        elif token >= 0:
            p_of[token] = math.exp(logprob)
    outcomes = [(p, logq_V[token]) for token, p in p_of.items()]
    rest = [token for token in range(len(logq_V)) if token not in p_of]
    if rest:
        outcomes.append((math.exp(problem.tail_logprob[n].item()) + moved, logq_V[rest].logsumexp(dim=0)))
    return sum((p * (math.log(p) - logq) for p, logq in outcomes if p > 0), start=logq_V.new_zeros(()))


def _advantage(problem: Problem, n: int, logq_V: Tensor) -> Tensor:
    advantage_of: dict[int, float] = {}
    for token, advantage in zip(problem.topk_ids[n].tolist(), problem.advantages[n].tolist(), strict=True):
        if 0 <= token < len(logq_V):
            advantage_of.setdefault(token, advantage)
    finite = {token: value for token, value in advantage_of.items() if math.isfinite(value)}
    return sum((-logq_V[token].exp() * a for token, a in finite.items()), start=logq_V.new_zeros(()))

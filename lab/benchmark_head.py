"""What the loss head costs beside eager losses, bare matrix products and other fused heads.

    python -m adpa.lab.benchmark_head --device cpu     (part of `make bench`)
    python -m adpa.lab.benchmark_head --device cuda    (`make bench-gpu`, after the tests have passed on the GPU)

Every way computes the loss and the gradients of hidden states and weight. The ways have their turns round by round in
one process, on inputs drawn anew for each round; quoted are medians of the rounds' ratios, with the lowest and highest.
Extra memory is the peak beyond the inputs; on a CPU it is the growth of a process of its own.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

import argparse
import importlib
import itertools
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adpa.kernels.head import distill_head

CPU_CASE = (2048, 49152, 576, 50)
GPU_VOCABULARIES = ((128256, 896), (128256, 2048), (151936, 896), (151936, 2048))
GPU_ROWS = (4096, 16384, 32768)
GPU_IDS = (16, 50, 128)
SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """The shape of a step; ``share`` is the part of the rows that any term counts in."""

    N: int
    V: int
    d: int
    K: int
    share: float = 1.0


@dataclass(frozen=True)
class Inputs:
    """What ``distill_head`` takes, with random numbers; hidden and weight require gradients."""

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
    """Inputs of a case, other ones for each seed."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    first = torch.randint(case.V, (case.N, 1), generator=generator, device=device)
    gaps = torch.randint(1, case.V // case.K, (1, case.K), generator=generator, device=device)
    logprobs = (normal(case.N, case.K) - 0.1 * torch.arange(case.K, device=device)).log_softmax(1) - 0.05
    counts = (torch.rand(case.N, generator=generator, device=device) < case.share).float() / case.N
    return Inputs(
        hidden=normal(case.N, case.d).to(dtype).requires_grad_(),
        weight=(normal(case.V, case.d) / case.d**0.5).to(dtype).requires_grad_(),
        labels=torch.randint(case.V, (case.N,), generator=generator, device=device),
        topk_ids=(first + gaps.cumsum(1)) % case.V,
        teacher_logprobs=logprobs,
        tail_logprob=torch.log1p(-logprobs.exp().sum(1)),
        advantages=normal(case.N, case.K),
        nll_weight=counts,
        kl_weight=counts,
        advantage_weight=counts,
    )


def adpa_head(inputs: Inputs) -> Tensor:
    return distill_head(**vars(inputs))[0]


def eager(inputs: Inputs) -> Tensor:
    """Logits in the inputs' dtype, losses in float32, the tail as 1 − Σq: the cheapest that plain torch has."""
    logq_NV = (inputs.hidden @ inputs.weight.T).float().log_softmax(1)
    nll_N = -logq_NV.gather(1, inputs.labels[:, None]).squeeze(1)
    logq_NK = logq_NV.gather(1, inputs.topk_ids)
    tail_N = torch.log1p(-logq_NK.exp().sum(1).clamp(max=1 - 1e-6))
    p_NK, p_N = inputs.teacher_logprobs.exp(), inputs.tail_logprob.exp()
    kl_N = (p_NK * (inputs.teacher_logprobs - logq_NK)).sum(1) + p_N * (inputs.tail_logprob - tail_N)
    advantage_N = -(logq_NK.exp() * inputs.advantages).sum(1)
    return (inputs.nll_weight * nll_N + inputs.kl_weight * kl_N + inputs.advantage_weight * advantage_N).sum()


class _ThreeProducts(torch.autograd.Function):
    """The products of any head without its losses: logits, dX and dW, the logits standing in for their gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden_Nd: Tensor, weight_Vd: Tensor) -> Tensor:
        logits_NV = hidden_Nd @ weight_Vd.T
        ctx.save_for_backward(logits_NV @ weight_Vd, logits_NV.T @ hidden_Nd)
        return logits_NV[0, 0].float()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: Tensor) -> tuple[Tensor, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        return saved


def three_products(inputs: Inputs) -> Tensor:
    loss: Tensor = _ThreeProducts.apply(inputs.hidden, inputs.weight)
    return loss


def liger(chunk: int) -> Way:
    """Liger's fused linear cross-entropy, which has the NLL alone; its default is ``chunk`` 1."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    head = module.LigerFusedLinearCrossEntropyFunction.apply
    defaults = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None)

    def way(inputs: Inputs) -> Tensor:
        loss: Tensor = head(inputs.hidden, inputs.weight, inputs.labels, *defaults, chunk)[0]
        return loss

    return way


def cut_cross_entropy(inputs: Inputs) -> Tensor:
    """Apple's cut cross-entropy, which has the NLL alone."""
    loss: Tensor = importlib.import_module("cut_cross_entropy").linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.labels
    )
    return loss


def native(inputs: Inputs) -> Tensor:
    """PyTorch's own linear cross-entropy, which has the NLL alone."""
    loss: Tensor = torch.nn.functional.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels)
    return loss


def ways_on(device: str) -> dict[str, Way]:
    """What is compared, as far as it is installed."""
    ways: dict[str, Way] = {"adpa": adpa_head, "three products": three_products, "eager": eager}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        ways["torch, NLL only"] = native
    if device == "cuda":
        if importlib.util.find_spec("liger_kernel"):
            ways |= {f"Liger, NLL only, chunk ×{chunk}": liger(chunk) for chunk in (1, 2, 4, 8)}
        if importlib.util.find_spec("cut_cross_entropy"):
            ways["cut cross-entropy, NLL only"] = cut_cross_entropy
    return ways


def step(way: Way, inputs: Inputs) -> None:
    """Loss and gradients, which are then dropped."""
    way(inputs).backward()
    inputs.hidden.grad = inputs.weight.grad = None


@dataclass(frozen=True)
class Measurement:
    """A way on a case: seconds of each round, or none where memory ran out, and extra peak memory in bytes."""

    case: Case
    way: str
    seconds: list[float]
    memory: int


def measure_cuda(case: Case, dtype: torch.dtype, ways: dict[str, Way], rounds: int) -> list[Measurement]:
    """Times with device events, after a round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, int] = {}
    for number in range(rounds + 1):
        inputs = random_inputs(case, "cuda", dtype, seed=number)
        for name, way in ways.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                start.record()
                step(way, inputs)
                end.record()
            except torch.OutOfMemoryError:
                inputs.hidden.grad = inputs.weight.grad = None
                continue
            torch.cuda.synchronize()
            if number:
                seconds[name].append(start.elapsed_time(end) / 1e3)
            memory[name] = torch.cuda.max_memory_allocated() - before
    return [Measurement(case, name, seconds[name], memory.get(name, 0)) for name in ways]


def measure_cpu(case: Case, dtype: torch.dtype, ways: dict[str, Way], rounds: int) -> list[Measurement]:
    """Times in this process, and memory in a process for each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        inputs = random_inputs(case, "cpu", dtype, seed=number)
        for name, way in ways.items():
            start = time.perf_counter()
            step(way, inputs)
            if number:
                seconds[name].append(time.perf_counter() - start)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(extra_memory, (case, dtype, name)) for name in ways}
    return [Measurement(case, name, seconds[name], memory[name]) for name in ways]


def extra_memory(case: Case, dtype: torch.dtype, name: str) -> int:
    """By how many bytes a step makes the largest resident size of this process grow."""
    inputs = random_inputs(case, "cpu", dtype, seed=0)
    small = random_inputs(Case(8, 64, case.d, 4), "cpu", dtype, seed=0)
    way = ways_on("cpu")[name]
    step(way, small)  # what is imported and started once is no memory of the step
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(way, inputs)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def table_of(measurements: list[Measurement], baseline: str) -> Table:
    """One line for each way and case: time against the baseline in the same round, and memory against it."""
    table = Table("N", "V", "d", "K", "rows", "way", "ms", f"time / {baseline}", "extra MB", f"memory / {baseline}")
    for _, group in itertools.groupby(measurements, key=lambda one: one.case):
        ways = {one.way: one for one in group}
        base = ways[baseline]
        for name, one in ways.items():
            ratios = [mine / theirs for mine, theirs in zip(one.seconds, base.seconds, strict=False)]
            shape = (one.case.N, one.case.V, one.case.d, one.case.K, f"{one.case.share:.0%}")
            table.add_row(
                *map(str, shape),
                name,
                f"{1e3 * statistics.median(one.seconds):,.1f}" if one.seconds else "out of memory",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "",
                f"{one.memory / 1e6:,.0f}",
                f"{one.memory / base.memory:.2f}" if base.memory else "",
            )
    return table


def gpu_cases() -> list[Case]:
    """Every vocabulary and number of rows at K = 50, and every K and share at one of them."""
    sizes = [Case(N, V, d, 50) for (V, d), N in itertools.product(GPU_VOCABULARIES, GPU_ROWS)]
    V, d = GPU_VOCABULARIES[2]
    return (
        sizes
        + [Case(16384, V, d, K) for K in GPU_IDS if K != 50]
        + [Case(16384, V, d, 50, share) for share in SHARES if share != 1]
    )


def main() -> None:
    """Measures, prints the table and writes the numbers, on a GPU with the errors first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m adpa.lab.benchmark_head")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="how often every way has its turn")
    parser.add_argument("--output", type=Path, help="directory for the numbers as JSON")
    arguments = parser.parse_args()
    ways = ways_on(arguments.device)
    if arguments.device == "cuda":
        name = torch.cuda.get_device_name()
        measurements = [
            one for case in gpu_cases() for one in measure_cuda(case, torch.bfloat16, ways, arguments.rounds)
        ]
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        measurements = measure_cpu(Case(*CPU_CASE), torch.float32, ways, arguments.rounds)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{name}, torch {torch.__version__}, {arguments.rounds} rounds")
    console.print(table_of(measurements, "eager"))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        record = {"device": name, "torch": torch.__version__, "measurements": [asdict(one) for one in measurements]}
        (arguments.output / "head.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compares time and memory of the loss head with eager losses, bare matrix products and other fused heads.

    python -m benchmarks.head --device cpu     (part of `make bench`)
    python -m benchmarks.head --device cuda    (`make bench-gpu` measures the most important cases)

It first prints the gradients' errors in bfloat16 against float64. Then it measures time and memory: each head computes
the loss and the gradients of hidden states and weight. The heads take turns in one process, with new inputs in each
round. The tables show the median of the rounds' ratios, with the smallest and the largest. Extra memory is the peak
beyond the inputs. In the end it prints the goals, and whether they are met.

Shapes: N rows, d hidden size, V vocabulary, K teacher ids.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from benchmarks import head_report as report
from benchmarks.head_report import Error, Findings, Measurement
from benchmarks.head_ways import DTYPES, EAGER, OURS, Case, Inputs, Way, random_inputs, step, ways_on
from rich.console import Console
from torch import Tensor

from adpa.kernels import reference

CPU_CASE = Case(2048, 49152, 576, 50)
CPU_ERROR_CASE = Case(512, 4096, 64, 50)
GPU_VOCABULARIES = ((128256, 896), (128256, 2048), (151936, 896), (151936, 2048))
GPU_ROWS = (4096, 16384, 32768)
GPU_IDS = (16, 128)
GPU_SHARES = (0.25, 0.5)
GPU_ERROR_CASES = (Case(8192, 151936, 896, 50), Case(8192, 151936, 2048, 50))
REFERENCE_ROWS = 1024
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "veomni")


def gpu_cases() -> list[Case]:
    """Each vocabulary and number of rows at K = 50. For one vocabulary also each K and share, and cases without dX."""
    V, d = GPU_VOCABULARIES[2]
    return [
        *(Case(N, V, d, 50) for (V, d), N in itertools.product(GPU_VOCABULARIES, GPU_ROWS)),
        *(Case(16384, V, d, K) for K in GPU_IDS),
        *(Case(16384, V, d, 50, share) for share in GPU_SHARES),
        *(Case(N, V, d, 50, with_dX=False) for N in (GPU_ROWS[0], GPU_ROWS[-1])),
    ]


def gradient_errors(case: Case, device: str, ways: dict[str, Way]) -> list[Error]:
    """Errors of our head and of eager losses in bfloat16, against float64 on the same inputs."""
    inputs = random_inputs(case, device, torch.bfloat16, seed=0)
    exact_Nd, exact_Vd = exact_gradients(inputs)
    errors = []
    for name in (OURS, EAGER):
        gradients = torch.autograd.grad(ways[name](inputs), (inputs.hidden, inputs.weight))
        dX, dW = (
            float((gradient.double() - exact).norm() / exact.norm())
            for gradient, exact in zip(gradients, (exact_Nd, exact_Vd), strict=True)
        )
        errors.append(Error(case, name, dX, dW))
    return errors


def exact_gradients(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """dX and dW in float64, computed in chunks of rows, because the reference is dense."""
    parts = {name: tensor.split(REFERENCE_ROWS) for name, tensor in vars(inputs).items() if name != "weight"}
    weight_Vd = inputs.weight.detach().double()
    dhidden, dweight_Vd = [], torch.zeros_like(weight_Vd)
    weight_Vd.requires_grad_()
    for values in zip(*parts.values(), strict=True):
        part = dict(zip(parts, values, strict=True))
        part["hidden"] = part["hidden"].detach().double().requires_grad_()
        loss, _ = reference.distill_head(weight=weight_Vd, **part)
        dhidden_Cd, dweight_of_chunk_Vd = torch.autograd.grad(loss, (part["hidden"], weight_Vd))
        dhidden.append(dhidden_Cd)
        dweight_Vd += dweight_of_chunk_Vd
    return torch.cat(dhidden), dweight_Vd


def measure_cuda(case: Case, ways: dict[str, Way], rounds: int) -> list[Measurement]:
    """Each turn runs one step for peak memory, and then, with that memory allocated, one step for time."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory: dict[str, int] = {}
    for number in range(rounds + 1):
        inputs = random_inputs(case, "cuda", DTYPES["cuda"], seed=number)
        for name in list(memory if number else ways):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                step(ways[name], inputs)
                memory[name] = torch.cuda.max_memory_allocated() - before
                start.record()
                step(ways[name], inputs)
                end.record()
            except torch.OutOfMemoryError:
                inputs.hidden.grad = inputs.weight.grad = None
                seconds[name].clear()
                memory.pop(name, None)
                continue
            torch.cuda.synchronize()
            if number:  # the first round is a warm-up
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return [Measurement(case, name, seconds[name], memory.get(name, 0)) for name in ways]


def measure_cpu(case: Case, ways: dict[str, Way], rounds: int) -> list[Measurement]:
    """Extra memory is the peak growth of the process's resident size in a step, read from Linux's /proc."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory = dict.fromkeys(ways, 0)
    for number in range(rounds + 1):
        inputs = random_inputs(case, "cpu", DTYPES["cpu"], seed=number)
        for name, way in ways.items():
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
            before, start = resident_size("VmRSS"), time.perf_counter()
            step(way, inputs)
            if number:  # the first round is a warm-up
                seconds[name].append(time.perf_counter() - start)
                memory[name] = max(memory[name], resident_size("VmHWM") - before)
    return [Measurement(case, name, seconds[name], memory[name]) for name in ways]


def resident_size(name: str) -> int:
    """Resident size in bytes: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measured(device: str, cases: Sequence[Case], ways: dict[str, Way], rounds: int) -> Iterator[list[Measurement]]:
    """The measurements, case by case. Cases without dX measure our head alone."""
    measure = measure_cuda if device == "cuda" else measure_cpu
    for case in cases:
        yield measure(case, ways if case.with_dX else {OURS: ways[OURS]}, rounds)


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter here."""
    installed = {"python": sys.version.partition(" ")[0]}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def benchmark(
    device: str, cases: Sequence[Case], error_cases: Sequence[Case], rounds: int, output: Path | None, console: Console
) -> Findings:
    """Measures and prints. With ``output``, writes the numbers there after each case, and a plot at the end."""
    on_gpu = device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    ways, missing = ways_on(device)
    findings = Findings(name, versions(), missing)
    console.print(f"{name}; {', '.join(map(' '.join, findings.versions.items()))}; {rounds} rounds")
    for reason in dict.fromkeys(missing.values()):
        peers = "; ".join(peer for peer, its_reason in missing.items() if its_reason == reason)
        console.print(f"not here: {peers} ({reason})", markup=False)

    for case in error_cases:
        findings.errors.extend(gradient_errors(case, device, ways))
    console.print("Errors of the gradients in bfloat16, against float64:")
    console.print(report.error_table(findings.errors))

    for number, measurements in enumerate(measured(device, cases, ways, rounds), start=1):
        findings.measurements.extend(measurements)
        console.print(f"measured case {number} of {len(cases)}")
        if output is not None:
            report.write_numbers(findings, on_gpu, output)
    console.print(report.time_table(findings.measurements))
    console.print(report.goal_table(report.goals_of(findings, on_gpu)))
    if output is not None:
        plot = report.draw(findings, output)
        console.print(plot or "no plot: matplotlib is not installed (pip install matplotlib)", markup=False)
    return findings


def main() -> None:
    """Measures the cases of one device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m benchmarks.head")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds")
    parser.add_argument("--output", type=Path, help="directory for head-DEVICE.json and head-DEVICE.png")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    cases, error_cases = (gpu_cases(), GPU_ERROR_CASES) if on_gpu else ([CPU_CASE], [CPU_ERROR_CASE])
    console = Console(width=None if sys.stdout.isatty() else 160)
    benchmark(arguments.device, cases, error_cases, arguments.rounds, arguments.output, console)


if __name__ == "__main__":
    main()

"""Parts a to c of the GPU benchmark: tests of the kernels, the loss head beside its peers, and the GPU's ceilings."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from benchmarks import head
from benchmarks import head_report as report
from benchmarks.gpu.measures import figure_of, in_turns
from benchmarks.gpu.part import Figure, Measure, Setting
from benchmarks.head_report import Findings
from benchmarks.head_ways import LIGER_DEFAULT, OURS, SMALL, Case, Way, ways_on
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# test_compiled.py compiles for other GPUs. It needs no GPU, and runs with all other tests.
TESTS = ("tests/kernels", "--deselect", "tests/kernels/test_compiled.py")
DRY_TESTS = ("tests/kernels/test_losses.py", "-k", "refused_by_name")
OUTCOME = re.compile(r"(?<=\s)(PASSED|FAILED|ERROR)(?=\s)")

LARGEST = Case(16384, 131072, 4096, 50)
HEAD_CASES = (
    *(Case(16384, 151936, d, 50) for d in (896, 2048)),
    LARGEST,
    Case(16384, 151936, 896, 50, 0.5),
    *(Case(16384, 128256, d, 50) for d in (896, 2048)),
    *(Case(N, 151936, 896, 50, with_dX=False) for N in (4096, 32768)),
    Case(16384, 151936, 896, 128),
    Case(4096, 151936, 896, 50),
)
HEAD_ROUNDS = 3


def kernel_tests(setting: Setting) -> list[Measure]:
    """The measures of part a."""
    obstacle = None if (ROOT / "tests/kernels").is_dir() else "no tests here: this is not the repository"
    return [Measure("kernels' tests", 20, partial(run_tests, setting), obstacle)]


def run_tests(setting: Setting) -> Iterator[Figure]:
    """Runs pytest, stops it when the time is up, and counts the outcomes.

    Raises:
        RuntimeError: a test failed, or the tests did not end.
    """
    with_xdist = importlib.util.find_spec("xdist") is not None and not setting.dry
    processes = ("-n", str(max(1, (os.cpu_count() or 1) - 2))) if with_xdist else ()
    command = (sys.executable, "-m", "pytest", "-v", "--no-header", "--tb=short", "-p", "no:cacheprovider", *processes)
    with subprocess.Popen(
        [*command, *(DRY_TESTS if setting.dry else TESTS)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            text, _ = process.communicate(timeout=max(1.0, setting.left - 5))
            error = f"pytest ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            error = "the tests did not end in time"
    print(text)
    counts = outcomes(text)
    yield from (Figure(f"tests {name.lower()}", count) for name, count in counts.items())
    if process.returncode:
        failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError(failed[0] if failed else error)


def outcomes(text: str) -> dict[str, int]:
    """Counts the outcomes in the lines of ``pytest -v``, without the summary at the end."""
    progress, *_ = text.partition(" short test summary ")
    words = [match.group() for match in OUTCOME.finditer(progress)]
    return {name: words.count(name) for name in ("PASSED", "FAILED", "ERROR")}


def loss_head(setting: Setting) -> list[Measure]:
    """The measures of part b."""
    ways, missing = ways_on(setting.device)
    ways.pop(LIGER_DEFAULT, None)  # many times slower than every other head
    findings = Findings("", {}, missing)
    absent = [Measure(peer, 0, tuple, reason) for peer, reason in missing.items()]
    cases, error_cases = ((SMALL,), (SMALL,)) if setting.dry else (HEAD_CASES, head.GPU_ERROR_CASES)
    measures = [Measure(shape_name(case), 12, partial(head_case, setting, case, ways, findings)) for case in cases]
    measures[2:2] = [Measure("errors of the gradients", 6, partial(head_errors, setting, error_cases, ways, findings))]
    return [*absent, *measures, Measure("goals", 0, partial(head_goals, setting, findings))]


def head_case(setting: Setting, case: Case, ways: dict[str, Way], findings: Findings) -> Iterator[Figure]:
    """Time and memory of every head on a case."""
    (measurements,) = head.measured(setting.device, [case], ways, 1 if setting.dry else HEAD_ROUNDS)
    if case != LARGEST:  # it has no goal
        findings.measurements.extend(measurements)
    for one in measurements:
        if not one.seconds:
            print(f"{shape_name(case)}: {one.way} ran out of memory")
            continue
        memory = f"extra memory {one.memory / 1e6:,.0f} MB"
        yield figure_of(f"{shape_name(case)}: {one.way}", [1e3 * each for each in one.seconds], "ms", memory)
        if case == LARGEST and one.way == OURS:
            for operations in (8, 6):  # 8 for heads that compute the logits twice, 6 for ours
                rates = [head_flops(case, operations) / each / 1e12 for each in one.seconds]
                yield figure_of(f"adpa at d = {case.d}, V = {case.V}, by {operations}·N·d·V", rates, "TFLOP/s")


def shape_name(case: Case) -> str:
    """A case in words."""
    rows = f", {case.share:.0%} of the rows" if case.share < 1 else ""
    return f"N = {case.N}, V = {case.V}, d = {case.d}, K = {case.K}{rows}{'' if case.with_dX else ', no dX'}"


def head_flops(case: Case, operations: int) -> int:
    """FLOP of forward and backward pass: ``operations`` for each row, vocabulary entry and hidden unit."""
    return operations * case.N * case.d * case.V


def head_errors(setting: Setting, cases: Iterable[Case], ways: dict[str, Way], findings: Findings) -> Iterator[Figure]:
    """Errors of the gradients against float64."""
    for case in cases:
        errors = head.gradient_errors(case, setting.device, ways)
        findings.errors.extend(errors)
        for one in errors:
            yield Figure(f"d = {case.d}: error of dX, {one.way}", one.dX)
            yield Figure(f"d = {case.d}: error of dW, {one.way}", one.dW)


def head_goals(setting: Setting, findings: Findings) -> Iterator[Figure]:
    """The head's goals whose ratios were measured."""
    for goal in report.goals_of(findings, on_gpu=not setting.dry):
        if goal.found is not None:
            yield Figure(goal.ratio, goal.found, note=f"goal: at most {goal.must:g}, {goal.verdict}")


def ceilings(setting: Setting) -> list[Measure]:
    """The measures of part c."""
    return [
        Measure("copy", 3, partial(copy, setting)),
        Measure("products", 6, partial(products, setting)),
    ]


def copy(setting: Setting) -> Iterator[Figure]:
    """Bytes that a copy reads and writes in a second."""
    source = torch.ones(2**16 if setting.dry else 2**31, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    taken = in_turns({"copy": lambda: target.copy_(source)}, 10, setting.device)["copy"]
    yield figure_of("copy", [2 * len(source) / one / 1e9 for one in taken], "GB/s")


def products(setting: Setting) -> Iterator[Figure]:
    """FLOP/s of square products. The scoring head uses the one with bfloat16 factors and float32 sums."""
    size = 64 if setting.dry else 8192
    one, other = (torch.randn(size, size, device=setting.device) for _ in range(2))
    one_bf16, other_bf16 = one.bfloat16(), other.bfloat16()
    ways: dict[str, Callable[[], Tensor]] = {
        "bfloat16 product": lambda: one_bf16 @ other_bf16,
        "float32 product": lambda: one @ other,
        "bfloat16 product with a float32 result": lambda: float32_product(one_bf16, other_bf16),
    }
    for name, taken in in_turns(ways, 10, setting.device).items():
        yield figure_of(name, [2 * size**3 / each / 1e12 for each in taken], "TFLOP/s")


def float32_product(one: Tensor, other: Tensor) -> Tensor:
    """The product of bfloat16 matrices in float32. A CPU converts the factors first."""
    if one.device.type == "cpu":
        return one.float() @ other.float()
    return torch.mm(one, other, out_dtype=torch.float32)

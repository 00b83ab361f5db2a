"""The benchmark of the loss head: its measurements, tables and goals."""

import io
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from benchmarks import head as benchmark
from benchmarks import head_report as report
from benchmarks import head_ways as ways
from benchmarks.head_report import Error, Findings, Measurement
from benchmarks.head_ways import EAGER, LIGER_CHUNKS, LIGER_DEFAULT, OURS, PRODUCTS, Case
from rich.console import Console

from adpa.kernels.head import distill_head

SMALL = Case(96, 512, 16, 5)


def small_inputs(case: Case = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> ways.Inputs:
    return ways.random_inputs(case, "cpu", dtype, seed)


def measurements(case: Case, **milliseconds: list[float]) -> list[Measurement]:
    """Measurements of heads by the first words of their names. Bytes equal the milliseconds of the first round."""
    names = {"adpa": OURS, "products": PRODUCTS, "eager": EAGER, "liger": LIGER_DEFAULT, "best": LIGER_CHUNKS[1]}
    return [
        Measurement(case, names[name], times, int(times[0]) if times else 0) for name, times in milliseconds.items()
    ]


def test_our_head_and_eager_losses_are_the_same_loss() -> None:
    inputs = small_inputs()
    ours, theirs = ways.adpa_head(inputs), ways.eager(inputs)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-6)


def test_the_share_of_the_rows_that_count_is_exact_and_the_others_have_no_label() -> None:
    inputs = small_inputs(Case(96, 512, 16, 5, share=0.25))
    assert int((inputs.kl_weight != 0).sum()) == 24
    assert ((inputs.labels == ways.IGNORED) == (inputs.nll_weight == 0)).all()
    torch.testing.assert_close(ways.adpa_head(inputs).float(), ways.eager(inputs).float(), rtol=1e-5, atol=1e-6)


def test_the_reference_in_chunks_gives_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "REFERENCE_ROWS", 40)
    inputs = small_inputs()
    loss, _ = distill_head(**vars(inputs))
    expected = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    torch.testing.assert_close(benchmark.exact_gradients(inputs), expected, rtol=1e-9, atol=1e-12)


def test_in_bfloat16_our_head_errs_little_more_than_eager_losses() -> None:
    errors = benchmark.gradient_errors(SMALL, "cpu", ways.ways_on("cpu")[0])
    assert [one.way for one in errors] == [OURS, EAGER]
    assert all(1e-4 < number < 1e-2 for one in errors for number in (one.dX, one.dW))
    assert report.error_ratio(errors[1], errors) == (1, 1)
    assert max(report.error_ratio(errors[0], errors)) <= report.MOST_ERROR


@pytest.mark.slow
def test_eager_logits_take_more_memory_than_a_chunk_of_them() -> None:
    case = Case(1024, 32768, 8, 5)
    chosen: dict[str, ways.Way] = {OURS: ways.adpa_head, EAGER: ways.eager}
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # a new process has no freed memory to reuse
        measured = process.submit(benchmark.measure_cpu, case, chosen, 1).result()
    ours, theirs = (one.memory for one in measured)
    logits = 4 * case.N * case.V
    assert theirs >= 2 * logits
    assert 0.2 * logits <= ours <= 0.4 * logits  # a chunk is a quarter of the rows


def test_a_peer_that_cannot_run_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> ways.Way:
        raise ModuleNotFoundError("No module named 'peer'")

    def broken() -> ways.Way:
        return lambda inputs: inputs.hidden.sum() / inputs.weight[0, :3]

    monkeypatch.setattr(ways, "PEERS", {"absent": absent, "broken": broken})
    found, missing = ways.ways_on("cpu")
    assert list(found) == [OURS, PRODUCTS, EAGER]
    assert missing["absent"] == "ModuleNotFoundError: No module named 'peer'"
    assert missing["broken"].startswith("RuntimeError: ")


def test_a_run_prints_errors_times_and_goals_and_writes_numbers_and_a_plot(tmp_path: Path) -> None:
    text = io.StringIO()
    cases = [Case(96, 512, 16, 50), Case(96, 512, 16, 50, with_dX=False)]
    benchmark.benchmark("cpu", cases, [SMALL], 2, tmp_path, Console(file=text, width=160))
    printed = text.getvalue()
    assert printed.index("dX error") < printed.index("time / eager") < printed.index("must")
    (numbers,) = tmp_path.glob("head-cpu-*.json")
    assert numbers.with_suffix(".png").stat().st_size > 10_000
    written = json.loads(numbers.read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert all(len(one["seconds"]) == 2 for one in written["measurements"])
    assert [one["way"] for one in written["measurements"] if not one["case"]["with_dX"]] == [OURS]
    assert [goal["must"] for goal in written["goals"]] == [1.1, 0.15, 2.0]


def test_without_matplotlib_there_is_no_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    findings = Findings("a device", {}, {}, [], measurements(SMALL, adpa=[1.0], eager=[2.0]))
    assert report.draw(findings, tmp_path) is None


def test_a_device_has_files_of_its_own() -> None:
    findings = Findings("NVIDIA H100 80GB HBM3", {}, {})
    assert report.path_of(findings, Path("benchmarks"), ".png") == Path("benchmarks/head-nvidia-h100-80gb-hbm3.png")


def test_a_ratio_of_times_is_the_median_of_those_of_the_rounds() -> None:
    mine, theirs = measurements(SMALL, adpa=[1.0, 30.0, 2.0], eager=[2.0, 30.0, 8.0])
    assert report.ratios(mine, theirs) == [0.5, 1.0, 0.25]


def gpu_findings() -> Findings:
    """Results of a machine whose memory was too small for d = 2048 and for eager losses at 32,768 rows."""
    found = [
        *measurements(
            Case(16384, 128256, 896, 50), adpa=[14.0], products=[10.0], eager=[140.0], liger=[40.0], best=[20.0]
        ),
        *measurements(
            Case(16384, 151936, 896, 50), adpa=[15.0], products=[10.0], eager=[100.0], liger=[10.0], best=[30.0]
        ),
        *measurements(Case(16384, 128256, 2048, 50), adpa=[20.0], products=[18.0], eager=[]),
        *measurements(Case(32768, 128256, 896, 50), adpa=[900.0], products=[1.0], eager=[]),
        *measurements(Case(16384, 151936, 896, 50, 0.5), adpa=[9.0], eager=[100.0]),
        *measurements(Case(4096, 151936, 896, 50, with_dX=False), adpa=[100.0]),
        *measurements(Case(32768, 151936, 896, 50, with_dX=False), adpa=[104.0]),
    ]
    errors = [Error(SMALL, OURS, 3e-3, 1e-3), Error(SMALL, EAGER, 2e-3, 2e-3)]
    return Findings("a GPU", {}, {}, errors, found)


@pytest.mark.parametrize(
    ("ratio", "found", "verdict"),
    [
        ("time / three products, d = 896", 1.5, "missed"),
        ("time / three products, d = 2048", 20 / 18, "met"),
        ("time / eager, d = 896", 0.15, "met"),
        ("time / eager, d = 2048", None, "not measured"),
        ("time / best chunk of Liger, NLL only, d = 896", 1.5, "missed"),
        ("time / best chunk of Liger, NLL only, d = 2048", None, "not measured"),
        ("extra peak memory / eager", None, "not measured"),
        ("extra peak memory at N = 32768 / 4096, no dX", 1.04, "met"),
        ("time with half of the rows masked / none", 0.6, "missed"),
        ("error of dX and dW / that of eager", 1.5, "met"),
    ],
)
def test_a_goal_is_held_against_the_worst_of_its_cases(ratio: str, found: float | None, verdict: str) -> None:
    goals = {goal.ratio: goal for goal in report.goals_of(gpu_findings(), on_gpu=True)}
    goal = goals[ratio]
    assert goal.verdict == verdict
    assert goal.found == (None if found is None else pytest.approx(found))


def test_memory_that_ran_out_is_said_and_not_compared() -> None:
    text = io.StringIO()
    Console(file=text, width=160).print(report.time_table(gpu_findings().measurements))
    assert text.getvalue().count("out of memory") == 2


def test_the_gpus_cases_hold_all_that_the_goals_need() -> None:
    found = [
        one for case in benchmark.gpu_cases() for one in measurements(case, adpa=[1.0], products=[1.0], eager=[9.0])
    ]
    found += [Measurement(one.case, LIGER_DEFAULT, [9.0], 1) for one in found if one.way == OURS]
    goals = report.goals_of(Findings("a GPU", {}, {}, gpu_findings().errors, found), on_gpu=True)
    assert len(goals) == 10
    assert all(goal.found is not None for goal in goals)

"""Draws the plots of a study. Shapes: S points."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adpa.data.bootstrap import Interval
from adpa.data.cache.signal_rows import PADDING
from adpa.data.cache.signals import SignalTable
from adpa.data.summary import PLAUSIBLE
from adpa.lab.report import MethodResult, StudyReport
from adpa.pipeline.training.curves import BLUE, GREY, ORANGE, tidy

WIDTH, DPI = 8.0, 150
SHOWN_ROWS = 500


def plot_study(output: Path, report: StudyReport, signals: SignalTable) -> None:
    """Writes ``rewards.png``, ``gamma.png`` after a sweep of γ, and ``advantages.png`` if signals exist."""
    figure, axes = _figure(1 + 0.4 * len(report.methods))
    plot_rewards(axes, report.methods)
    figure.savefig(output / "rewards.png", dpi=DPI)
    swept = [one for one in report.variants if {"advantage_weight", "plausibility"} <= one.swept.keys()]
    if swept:
        figure, axes = _figure(4)
        plot_gamma(axes, swept, student=report.methods[0].reward.mean)
        figure.savefig(output / "gamma.png", dpi=DPI)
    if len(signals):
        figure, axes = _figure(4)
        plot_advantages(axes, signals)
        figure.savefig(output / "advantages.png", dpi=DPI)


def plot_rewards(axes: Axes, results: Sequence[MethodResult]) -> None:
    """Sampled and greedy reward of each method, with their intervals."""
    places_S = np.arange(len(results), dtype=np.float64)[::-1]
    _points(axes, places_S + 0.12, [one.reward for one in results], BLUE, "sampled")
    _points(axes, places_S - 0.12, [one.greedy_reward for one in results], GREY, "greedy")
    axes.set_yticks(places_S, [one.name for one in results])
    axes.set_xlabel("mean reward on held-out prompts, 95 % interval over seeds and prompts")
    axes.legend()


def plot_gamma(axes: Axes, results: Sequence[MethodResult], student: float) -> None:
    """Sampled reward with its interval against γ, one line for each plausibility."""
    for number, plausibility in enumerate(sorted({one.swept["plausibility"] for one in results})):
        color = (ORANGE, BLUE)[number] if number < 2 else f"C{number}"
        line = [one for one in results if one.swept["plausibility"] == plausibility]
        line.sort(key=lambda one: one.swept["advantage_weight"])
        gammas_S = [one.swept["advantage_weight"] for one in line]
        axes.plot(
            gammas_S, [one.reward.mean for one in line], "o-", color=color, label=f"plausibility {plausibility:g}"
        )
        low_S, high_S = [one.reward.low for one in line], [one.reward.high for one in line]
        axes.fill_between(gammas_S, low_S, high_S, color=color, alpha=0.2, linewidth=0)
    axes.axhline(student, color="black", linestyle="--", linewidth=1, label="SFT student")
    if all(one.swept["advantage_weight"] > 0 for one in results):
        axes.set_xscale("log", base=2)
    axes.set_xlabel("γ (--advantage-weight)")
    axes.set_ylabel("mean sampled reward")
    axes.legend()


def plot_advantages(axes: Axes, signals: SignalTable) -> None:
    """The advantage of each token id in S_t against its probability under the teacher, for some responses."""
    rows = [signals.row(number) for number in range(min(SHOWN_ROWS, len(signals)))]
    p_S = np.exp(np.concatenate([row.topk_logprobs[row.topk_ids != PADDING] for row in rows], dtype=np.float64))
    advantages = [np.asarray(row.topk_advantages)[row.topk_ids != PADDING] for row in rows]
    advantages_S = np.concatenate(advantages, dtype=np.float64)
    axes.plot(p_S, advantages_S, ".", markersize=1, color=BLUE, alpha=0.3, rasterized=True)
    axes.axhline(0, color="black", linewidth=1)
    axes.axvline(PLAUSIBLE, color=ORANGE, linestyle="--", linewidth=1, label=f"plausibility {PLAUSIBLE:g}")
    axes.set_xscale("log")
    axes.set_xlabel("probability that the teacher gives to the token")
    axes.set_ylabel("advantage, nats")
    axes.legend()


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    tidy(axes)
    return figure, axes


def _points(axes: Axes, places_S: NDArray[np.floating], intervals: Sequence[Interval], color: str, label: str) -> None:
    means_S = np.array([one.mean for one in intervals])
    errors_2S = [means_S - [one.low for one in intervals], [one.high for one in intervals] - means_S]
    axes.errorbar(means_S, places_S, xerr=errors_2S, fmt="o", markersize=4, color=color, label=label, capsize=2)

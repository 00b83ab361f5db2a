"""The report of a probe in a terminal: every number once, and only measured ones."""

from dataclasses import replace

from rich.console import Console

from adpa.data.fidelity import Fidelity
from adpa.data.reward_accuracy import RewardAccuracy
from adpa.pipeline.scoring.probe import ProbeReport
from adpa.pipeline.terminal.probe import show_probe

KEPT = [
    Fidelity(10, 0.9, 0.7, 0.1, 0.25, 0.75, 0.125, 9_000_000_000),
    Fidelity(50, 0.97, 0.8, 0.03, 0.0625, 0.5, 0.0625, 412_000_000_000),
]
REPORT = ProbeReport(
    responses=64,
    tokens=8_000,
    stand_ins=False,
    own_top_k=50,
    top_k=1000,
    tail=0.005,
    by_top_k=KEPT,
    data_responses=4_000_000,
    data_tokens=1_000_000_000,
    input_tokens=3_000_000_000,
    kl_against="reference",
    teacher_hours=20.0,
    reference_hours=21.5,
    missing_hours=41.5,
)


def shown(report: ProbeReport, unsampled: int = 0) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(show_probe(report, unsampled))
    return " ".join(capture.get().split())


def test_every_k_has_its_line_even_where_the_data_are_large() -> None:
    text = shown(REPORT)
    assert "mass mass tail KL lost KL lost bytes/ K mean 5% mean mean 95% A lost token bytes" in text
    assert "10 0.9000 0.7000 0.1000 0.25 0.75 12.50% 9 9,000,000,000" in text
    assert "50 0.9700 0.8000 0.0300 0.062 0.5 6.25% 412 412,000,000,000" in text
    assert "Hours: 41.5 (teacher 20, reference 21.5) for 3,000,000,000 tokens" in text
    assert "sampled yet" not in text


def test_a_stand_in_for_the_student_is_named() -> None:
    assert "the reference stands in" in shown(REPORT)
    assert "stands in" not in shown(replace(REPORT, kl_against="student"))


def test_what_was_not_measured_has_no_column() -> None:
    alone = [replace(kept, kl_lost=None, kl_lost_95=None, advantage_lost=None) for kept in KEPT]
    text = shown(replace(REPORT, by_top_k=alone, kl_against=None, reference_hours=None, missing_hours=20.0))
    assert "mass mass tail bytes/ K mean 5% mean token bytes" in text
    assert "are unknown" in text
    assert "Hours: 20 for" in text


def test_the_probed_pairs_have_a_line_if_there_are_any() -> None:
    line = (
        "Probed pairs: teacher − reference prefers the chosen response in 62.5 % of 32 pairs, mean margin -1.50 nats."
    )
    assert line in shown(replace(REPORT, rewards=RewardAccuracy(32, 0.625, -1.5)))
    assert "prefers" not in shown(REPORT)


def test_hours_that_the_cache_saves_are_told() -> None:
    assert "Hours: 41.5 (teacher 20, reference 21.5, 4.2 for what the cache lacks)" in shown(
        replace(REPORT, missing_hours=4.2)
    )


def test_responses_that_are_not_sampled_yet_are_told() -> None:
    assert "197 responses are not sampled yet: none of them was probed" in shown(REPORT, 197)
    assert "chosen ones were probed in their place, and 197 are counted" in shown(replace(REPORT, stand_ins=True), 197)

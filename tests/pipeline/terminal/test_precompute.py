"""The report of stage one in a terminal: what happened to the pairs, and no zeros that say nothing."""

from dataclasses import replace

from rich.console import Console

from adpa.pipeline.precompute import PrecomputeReport
from adpa.pipeline.terminal.precompute import show_precompute

REPORT = PrecomputeReport(
    rows=1200,
    used=1200,
    duplicates=0,
    identical=0,
    contradicting=0,
    scored=0,
    reused=2400,
    resumed=0,
    resumed_halves=0,
    resumed_samples=0,
    sampled=0,
    awaited=0,
    tokens=0,
    bytes=0,
    truncated_prompts=0,
    prompts=1200,
    truncated_responses=0,
    thinking_left_out=0,
    dropped=0,
    dropped_by_reason={},
    engine="hf",
    engine_reason="there is no GPU",
    workers=1,
    part="1/1",
    scoring="227c2b4372d065c5",
    responses={"chosen": "a723f17867f68313"},
    seconds=1.5,
    dry_run=False,
)


def shown(report: PrecomputeReport) -> list[tuple[str, str]]:
    """The two cells of each line of the table."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(show_precompute(report))
    cells = [line.split("│") for line in capture.get().splitlines() if line.startswith("│")]
    return [(name.strip(), value.strip()) for _, name, value, _ in cells]


def test_pairs_without_a_fault_take_two_lines() -> None:
    assert shown(REPORT)[:4] == [("pairs", "read 1,200"), ("", "used 1,200"), ("scored", "0"), ("reused", "2,400")]


def test_what_is_left_out_or_repeated_stands_with_the_pairs() -> None:
    reasons = {"null response": 100, "empty response": 7}
    report = replace(REPORT, used=1093, dropped=107, dropped_by_reason=reasons)
    report = replace(report, duplicates=12, identical=3, contradicting=1)
    assert shown(report)[:8] == [
        ("pairs", "read 1,200"),
        ("", "used 1,093"),
        ("", "dropped: null response 100"),
        ("", "dropped: empty response 7"),
        ("", "duplicates 12"),
        ("", "identical responses 3"),
        ("", "contradicting 1"),
        ("scored", "0"),
    ]


def test_counts_of_what_is_rare_are_shown_where_they_are_not_zero() -> None:
    rare = ("resumed", "resumed halves", "resumed samples", "sampled", "awaited", "thinking left out")
    assert not {name for name, _ in shown(REPORT)} & set(rare)
    report = replace(REPORT, resumed=1, resumed_halves=2, resumed_samples=3, sampled=4, awaited=5, thinking_left_out=6)
    lines = dict(shown(report))
    assert [lines[name] for name in rare] == ["1", "2", "3", "4", "5", "6"]


def test_every_other_field_is_shown_once() -> None:
    names = [name for name, _ in shown(REPORT) if name]
    assert names == [
        *("pairs", "scored", "reused", "tokens", "bytes", "truncated prompts", "truncated responses", "engine"),
        *("engine reason", "workers", "part", "scoring", "responses", "seconds", "dry run"),
    ]

"""The report of stage one in a terminal: what happened to the pairs, and no zeros that say nothing."""

from dataclasses import replace

import pytest
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


def test_pairs_without_a_fault_take_one_line() -> None:
    assert shown(REPORT)[:3] == [("pairs", "1,200"), ("scored", "0"), ("reused", "2,400")]


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
    rare = ["resumed", "resumed halves", "resumed samples", "sampled", "awaited", "thinking left out"]
    rare += ["truncated prompts", "truncated responses", "tokens", "bytes"]
    assert not {name for name, _ in shown(REPORT)} & set(rare)
    report = replace(REPORT, resumed=1, resumed_halves=2, resumed_samples=3, sampled=4, awaited=5, thinking_left_out=6)
    lines = dict(shown(replace(report, truncated_prompts=7, truncated_responses=8, tokens=9, bytes=10)))
    assert [lines[name] for name in rare] == [str(count) for count in range(1, 11)]


def test_settings_are_shown_where_they_are_not_the_usual_ones() -> None:
    assert not {"workers", "part", "dry run", "engine reason"} & {name for name, _ in shown(REPORT)}
    lines = dict(shown(replace(REPORT, workers=4, part="2/3")))
    assert (lines["workers"], lines["part"]) == ("4", "2/3")


@pytest.mark.parametrize(
    ("engine", "reason", "said"),
    [
        ("hf", "there is no GPU", "hf; there is no GPU"),
        ("hf", "as asked", "hf"),
        ("vllm", "a GPU and vLLM are there", "vllm"),
        ("vllm", "as asked; vLLM's own head, as asked", "vllm"),
        ("vllm", "as asked; vLLM's own head, because it is tied", "vllm; vLLM's own head, because it is tied"),
    ],
)
def test_the_reason_of_an_engine_is_told_unless_somebody_asked_for_it(engine: str, reason: str, said: str) -> None:
    assert dict(shown(replace(REPORT, engine=engine, engine_reason=reason)))["engine"] == said


def test_a_dry_run_has_a_title_of_its_own() -> None:
    def title(report: PrecomputeReport) -> str:
        console = Console(width=80)
        with console.capture() as capture:
            console.print(show_precompute(report))
        return capture.get().splitlines()[0].strip()

    assert title(REPORT) == "adpa precompute"
    assert title(replace(REPORT, dry_run=True)) == "adpa precompute --dry-run"


def test_every_other_field_is_shown_once() -> None:
    names = [name for name, _ in shown(REPORT) if name]
    assert names == ["pairs", "scored", "reused", "engine", "scoring", "responses", "seconds"]

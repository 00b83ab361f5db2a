"""Any report as a table: a row for each field that says something."""

from dataclasses import dataclass, field

from rich.console import Console

from adpa.pipeline.terminal.report import show_report


@dataclass
class Report:
    rows: int = 1200
    dropped: int = 0
    dropped_by_reason: dict[str, int] = field(default_factory=dict)
    scoring: str | None = None
    warnings: list[str] = field(default_factory=list)


def shown(report: Report) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(show_report("precompute", report))
    lines = capture.get().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_a_field_that_says_nothing_has_no_row() -> None:
    assert shown(Report()) == [["rows", "1,200"], ["dropped", "0"]]
    assert shown(Report(dropped_by_reason={"too_long": 0})) == [["rows", "1,200"], ["dropped", "0"]]


def test_a_long_word_is_folded_and_whole() -> None:
    long = "/" + "a-folder/" * 20
    lines = [value for name, value in shown(Report(scoring=long)) if name in ("scoring", "")]
    assert "".join(lines) == long


def test_a_mapping_has_a_line_for_each_entry() -> None:
    report = Report(dropped=3, dropped_by_reason={"too_long": 2, "blank": 1}, scoring="0123", warnings=["one", "two"])
    assert shown(report)[2:] == [
        ["dropped by reason", "too long 2"],
        ["", "blank 1"],
        ["scoring", "0123"],
        ["warnings", "one"],
        ["", "two"],
    ]

"""Shows the report of ``evaluate`` in a terminal."""

from dataclasses import asdict, replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Column, Table
from rich.text import Text

from adpa.data.answers import Comparison
from adpa.data.pieces import visible
from adpa.data.shown_answers import ShownPrompt
from adpa.pipeline.evaluate import EvaluateReport
from adpa.pipeline.terminal.report import engine_text, show_report
from adpa.pipeline.training.evaluation_numbers import interval_text, number_text

MOST_CHARACTERS = 600  # of a text
SIDE_BY_SIDE = 100  # columns of a terminal that two answers take
SUMMARY = {
    "implicit_reward": "implicit reward",
    "implicit_reward_per_token": "… per token",
    "tokens": "tokens",
    "ended": "ended by itself",
    "repetition": "repetition",
}
AGAINST = {
    "win_rate": "win rate",
    "win_rate_per_token": "win rate per token",
    "difference": "reward difference",
    "difference_per_token": "… per token",
}
RARE_COUNTS = (
    "repeated_prompts",
    "truncated_prompts",
    "truncated_responses",
    "thinking_left_out",
    "dropped",
    "dropped_by_reason",
)


def show_evaluation(report: EvaluateReport) -> RenderableType:
    """The answers that were asked for; then the two models' numbers side by side, the counts, and the note."""
    below: list[RenderableType] = [_models(report), "", _against(report), "", _pairs(report), "", _counts(report)]
    shown = [_Shown(one, f"Prompt {number}") for number, one in enumerate(report.shown, 1)]
    return Group(*[part for one in shown for part in (one, "")], *below, "", Text(report.note))


def _ways(report: EvaluateReport) -> dict[str, Comparison]:
    """The comparisons by how the answers were made: one of them at temperature 0."""
    assert report.greedy is not None
    if not report.temperature:
        return {"greedy": report.greedy}
    sampled = Comparison(**{name: getattr(report, name) for name in Comparison.__dataclass_fields__})
    return {"sampled": sampled, "greedy": report.greedy}


def _models(report: EvaluateReport) -> Table:
    ways = _ways(report)
    columns = [Column(f"{model}\n{way}", justify="right") for way in ways for model in ("student", "baseline")]
    table = Table("mean of the answers", *columns, title="adpa evaluate")
    for field, name in SUMMARY.items():
        values = [getattr(one, field) for way in ways.values() for one in (way.student, way.baseline)]
        table.add_row(name, *map(number_text, values))
    return table


def _against(report: EvaluateReport) -> Table:
    ways = _ways(report)
    table = Table("student against baseline", *(Column(f"{way} [95 %]", justify="right") for way in ways))
    for field, name in AGAINST.items():
        table.add_row(name, *(interval_text(**vars(getattr(way, field))) for way in ways.values()))
    return table


def _pairs(report: EvaluateReport) -> RenderableType:
    if report.student_perplexity is None or report.baseline_perplexity is None:
        return Text(
            "The data has prompts alone: perplexity and the student's reward accuracy need chosen and rejected "
            "responses."
        )
    table = Table("on the responses of the data", *(Column(one, justify="right") for one in ("student", "baseline")))
    table.add_row(
        "perplexity of the chosen", *map(number_text, (report.student_perplexity, report.baseline_perplexity))
    )
    if report.reward_accuracy is None or report.reward_margin is None:
        return table
    pairs = "pair" if report.reward_pairs == 1 else "pairs"
    rewards = Text(
        f"The student's own reward, log π_student − log π_baseline, prefers the chosen response in "
        f"{100 * report.reward_accuracy:.1f} % of {report.reward_pairs:,} {pairs}, "
        f"mean margin {report.reward_margin:+,.3g} nats."
    )
    return Group(table, rewards)


def _counts(report: EvaluateReport) -> Table:
    done = {
        "prompts": report.prompts,
        "sampled now": report.sampled,
        "answered greedily now": report.answered_greedily,
        "scored now": report.scored,
        "scored by students now": report.scored_by_students,
    }
    kept = {*done, "engine", "seconds", *(name for name in RARE_COUNTS if getattr(report, name))}
    shown = replace(report, engine=engine_text(report.engine, report.engine_reason))
    table = show_report("evaluate", shown, leave_out=asdict(report).keys() - kept, first=done)
    table.title = None
    return table


class _Shown:
    """A prompt and the two answers: side by side in a wide terminal, else one under the other."""

    def __init__(self, shown: ShownPrompt, title: str) -> None:
        self._shown, self._title = shown, title

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yields a table."""
        shown = self._shown
        heads = [
            f"{model}, implicit reward {getattr(shown, f'{model}_reward'):,.4g}" for model in ("student", "baseline")
        ]
        answers = [_text(shown.student), _text(shown.baseline)]
        last = f", the user's last of {shown.messages:,} messages" if shown.messages > 1 else ""
        yield Text(f"{self._title}{last}: ", style="bold") + _text(shown.prompt)
        if options.max_width >= SIDE_BY_SIDE:
            columns = [Column(head, ratio=1, overflow="fold") for head in heads]
            table = Table(*columns, expand=True)
            table.add_row(*answers)
            yield table
            return
        for head, answer in zip(heads, answers, strict=True):
            table = Table(Column(head, overflow="fold"), expand=True)
            table.add_row(answer)
            yield table


def _text(text: str) -> Text:
    """A text whose characters cannot control a terminal; of a long one the beginning, with the count of the rest."""
    left_out = len(text) - MOST_CHARACTERS
    shown = Text(visible(text[:MOST_CHARACTERS], newline="\n"))
    return shown if left_out <= 0 else shown + Text(f" … {left_out:,} more characters", style="dim")

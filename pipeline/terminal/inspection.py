"""Shows the report of ``inspect_cache`` in a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from adpa.data.inspection import Alternative, InspectedResponse, InspectedToken
from adpa.data.pieces import visible
from adpa.data.summary import PLAUSIBLE, SignalSummary
from adpa.pipeline.inspect import InspectReport
from adpa.pipeline.terminal.token_colours import colour

STRONGEST = 5  # tokens of a response that are shown with the teacher's alternatives
CONTINUES = "⁺"  # in the place of a token whose character stands over an earlier token
BOLD = Style(bold=True)


def show_inspection(report: InspectReport) -> RenderableType:
    """The summaries, the reward accuracies, then the responses in colour, each with its strongest tokens."""
    parts: list[RenderableType] = []
    for summary in report.summaries:
        parts += [_show_summary(summary), ""]
    for rewards in report.rewards:
        parts += [Text(rewards.of(), BOLD), Text(f"{rewards.describe()}\n")]
    if report.data:
        parts += [_line(f"data: {report.data}"), ""]
    parts += [_line(f"left out: {line}") for line in report.left_out]
    if len(report.summaries) > 1:
        parts.append(Text("Choose one with --response-set and --scoring to see its responses."))
    if report.responses:
        parts.append(_legend(report))
    for response in report.responses:
        parts += ["", *_show_response(response, report.summaries[0].colour_scale)]
    below = [f"run {run.describe()}" for run in report.runs]
    below += [f"wrote {report.html}"] if report.html is not None else []
    parts += ["", *map(_line, below)] if below else []
    return Group(*parts)


def _line(text: str) -> Text:
    return Text(visible(text), overflow="fold")


def _show_summary(summary: SignalSummary) -> RenderableType:
    distributions = summary.distributions()
    table = Table("per token", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in distributions:
        table.add_column(name, justify="right", min_width=7)  # -18.434
    rows = [{"mean": values.mean} | values.quantiles for values in distributions.values()]
    for name in rows[0]:
        table.add_row(name, *(f"{row[name]:z.3f}" for row in rows))
    reference = "no reference" if summary.reference is None else f"reference {summary.reference}"
    lines = [
        f"teacher {summary.teacher}, {reference}",
        f"{summary.made}; {summary.tokens:,} tokens, "
        f"{summary.in_top_k:.2%} of them in the teacher's top {summary.top_k}",
    ]
    for relation, group in (("≥", summary.plausible), ("<", summary.implausible)):
        if group is not None:
            line = f"teacher p {relation} {PLAUSIBLE:g}: {group.entries:,} advantages, {group.positive:,} positive"
            if group.mean_positive is not None:
                line += f", mean {group.mean_positive:.3f}, largest {group.largest:.3f}"
            lines.append(line)
    if summary.token_advantage is None:
        lines.append("no reference, hence no advantages: log-probabilities colour the tokens")
    title = Text(f"{summary.response_set}, scoring {summary.scoring}", BOLD, overflow="fold")
    return Group(title, *map(_line, lines[:2]), "", table, "", *map(_line, lines[2:]))


def _legend(report: InspectReport) -> Text:
    """What the colours mean, and the sign of a token whose character stands over an earlier one."""
    summary = report.summaries[0]
    legend = Text(f"colours: {summary.coloured_by} ")
    for value in summary.legend:
        legend.append(f" {value:+.2g} " if value else " 0 ", colour(value, summary.colour_scale))
    if any(token.part > 1 for response in report.responses for token in response.tokens):
        legend.append(f"\n{CONTINUES} one more token of the character before it")
    return legend


def _show_response(response: InspectedResponse, scale: float) -> list[RenderableType]:
    text = Text()
    for token in response.tokens:
        shown = CONTINUES if token.part > 1 else token.text or token.label
        text.append(visible(shown, newline="↵\n"), colour(token.value, scale) + Style(italic=token.special))
    return [
        Text(f"example {response.example_id}", BOLD),
        Text(visible(response.prompt, newline="\n").strip(), Style(dim=True)),
        text,
        "",
        _strongest_tokens(response, scale),
    ]


def _strongest_tokens(response: InspectedResponse, scale: float) -> RenderableType:
    """The tokens with the largest values and the teacher's choices, each above its probability and advantage."""
    strongest = sorted(range(len(response.tokens)), key=lambda place: -abs(response.tokens[place].value))[:STRONGEST]
    shown: dict[int, list[InspectedToken | Alternative]]
    shown = {place: [response.tokens[place], *response.tokens[place].alternatives] for place in sorted(strongest)}
    with_advantages = response.tokens[0].advantage is not None
    title = "strongest tokens and the teacher's choices; p: its probability" + ", A: advantage" * with_advantages
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("token", justify="right", no_wrap=True)
    for name in ("", *(f"choice {rank + 1}" for rank in range(max(map(len, shown.values())) - 1))):
        table.add_column(name, overflow="fold", min_width=7)  # -10.43, of which no digit may be lost
    for place, tokens in shown.items():
        labels = [response.tokens[place].label, *(one.text for one in response.tokens[place].alternatives)]
        table.add_row(f"{place:,}", *(visible(label).replace(" ", "·") for label in labels), style=BOLD)
        table.add_row("p", *(f"{one.probability:.2f}" for one in tokens))
        if with_advantages:
            table.add_row("A", *(_advantage(one, scale) for one in tokens))
    return Group(Text(title), table)


def _advantage(token: InspectedToken | Alternative, scale: float) -> Text:
    assert token.advantage is not None
    return Text().append(f"{token.advantage:+.2f}", colour(token.advantage, scale))

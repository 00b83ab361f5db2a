"""Shows the report of ``inspect_cache`` in a terminal."""

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from adpa.data.inspection import Alternative, InspectedResponse, InspectedToken
from adpa.data.pieces import visible
from adpa.data.summary import PLAUSIBLE, QUANTILES, SignalSummary
from adpa.pipeline.inspect import InspectReport

# Backgrounds on which white text is readable, in light and in dark terminals.
RED, GREY, GREEN = (190, 30, 45), (105, 105, 105), (0, 125, 60)
STRONGEST = 5  # tokens of a response that are shown with the teacher's alternatives


def show_inspection(report: InspectReport) -> RenderableType:
    """The summaries, the reward accuracies, then the responses in colour, each with its strongest tokens."""
    parts: list[RenderableType] = []
    for summary in report.summaries:
        parts += [_show_summary(summary), ""]
    for rewards in report.rewards:
        parts += [Text(rewards.of(), Style(bold=True)), Text(f"{rewards.describe()}\n")]
    if report.data:
        parts += [Text(f"data: {report.data}", overflow="fold"), ""]
    parts += [Text(f"left out: {line}") for line in report.left_out]
    if len(report.summaries) > 1:
        parts.append(Text("Choose one with --response-set and --scoring to see its responses."))
    for response in report.responses:
        parts += ["", *_show_response(response, report.summaries[0])]
    if report.html is not None:
        parts.append(Text(f"wrote {report.html}", overflow="fold"))
    return Group(*parts)


def colour(value: float, scale: float) -> Style:
    """White text on red below zero, on green above, on grey at zero; the full colour from ``scale`` on."""
    strength = min(abs(value) / scale, 1.0)
    mixed = (round(grey + strength * (end - grey)) for grey, end in zip(GREY, GREEN if value > 0 else RED, strict=True))
    return Style(color="#ffffff", bgcolor="#{:02x}{:02x}{:02x}".format(*mixed))


def _show_summary(summary: SignalSummary) -> RenderableType:
    table = Table("per token", box=None, padding=(0, 1, 0, 0))
    for name in ("mean", *QUANTILES):
        table.add_column(name, justify="right")
    for name, values in summary.distributions().items():
        table.add_row(name, *(f"{value:.3f}" for value in (values.mean, *values.quantiles.values())))
    lines = [
        f"{visible(summary.made)}; {summary.tokens:,} tokens, "
        f"{summary.in_top_k:.2%} of them in the teacher's top {summary.top_k}"
    ]
    for relation, group in (("≥", summary.plausible), ("<", summary.implausible)):
        if group is not None:
            line = f"teacher p {relation} {PLAUSIBLE:g}: {group.entries:,} advantages, {group.positive:,} positive"
            if group.mean_positive is not None:
                line += f", mean {group.mean_positive:.3f}, largest {group.largest:.3f}"
            lines.append(line)
    if summary.token_advantage is None:
        lines.append("no reference, hence no advantages: log-probabilities colour the tokens")
    title = Text(f"{summary.response_set}, scoring {summary.scoring}\n", Style(bold=True))
    return Group(title, table, "", *map(Text, lines))


def _show_response(response: InspectedResponse, summary: SignalSummary) -> list[RenderableType]:
    scale = summary.colour_scale
    text = Text()
    for token in response.tokens:
        text.append(visible(token.text, newline="↵\n"), colour(token.value, scale) + Style(italic=token.special))
    legend = Text("log-probability " if summary.token_advantage is None else "advantage ")
    for value in summary.legend:
        legend.append(f" {value:+.2g} ", colour(value, scale))
    return [
        Text(f"example {response.example_id}", Style(bold=True)),
        Text(visible(response.prompt, newline="\n").strip(), Style(dim=True)),
        text,
        legend,
        _strongest_tokens(response, scale),
    ]


def _strongest_tokens(response: InspectedResponse, scale: float) -> Table:
    """The tokens with the largest values and the teacher's choices, each above its probability and advantage."""
    strongest = sorted(range(len(response.tokens)), key=lambda place: -abs(response.tokens[place].value))[:STRONGEST]
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("at", justify="right")
    for name in ("token", *(f"choice {rank + 1}" for rank in range(len(response.tokens[0].alternatives)))):
        table.add_column(name, no_wrap=True)
    for place in sorted(strongest):
        token = response.tokens[place]
        table.add_row(str(place), _cell(token, scale), *(_cell(other, scale) for other in token.alternatives))
    return table


def _cell(token: InspectedToken | Alternative, scale: float) -> Text:
    """A token with its probability and advantage."""
    cell = Text(f"{visible(token.text).replace(' ', '·')}\n{token.probability:.2f} ")
    if token.advantage is not None:
        cell.append(f"{token.advantage:+.2f}", colour(token.advantage, scale))
    return cell

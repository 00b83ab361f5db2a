"""Renders the report of ``inspect_cache`` as one HTML page, without scripts or other files."""

from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from adpa.data.inspection import InspectedResponse
from adpa.data.pieces import visible
from adpa.data.reward_accuracy import SetRewards
from adpa.data.summary import PLAUSIBLE, QUANTILES, SignalSummary

RED, GREEN = "214 40 57", "0 146 70"
STRONGEST = 0.6  # opacity of a full colour; the text stays readable on light and on dark pages

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>adpa inspect: {{ summary.response_set }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto 16rem; padding: 0 1rem;
  color: light-dark(#16181d, #e8e9ec); background: light-dark(#ffffff, #16181d); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .6rem; text-align: right; font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; }
.wide { overflow-x: auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .9rem; }
.prompt { opacity: .7; border-left: 3px solid #888; padding-left: 1rem; }
.token { border-radius: 2px; cursor: default; }
.special { font-style: italic; }
.token:hover, .token:focus { outline: 2px solid #3584e4; }
.token > .card { display: none; }
.token:hover > .card, .token:focus > .card { display: block; }
.token:hover > .card { z-index: 1; }
.card { position: fixed; right: 1rem; bottom: 1rem; padding: .6rem; white-space: normal; font-style: normal;
  border: 1px solid #888; border-radius: 6px; background: light-dark(#ffffff, #23262d); }
.row { display: grid; grid-template-columns: 5rem 12rem 5rem 5rem; gap: .6rem; }
.row > * { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.warning { border-left: 3px solid rgb({{ red }}); padding-left: 1rem; }
.legend span { padding: 0 .5rem; }
</style>
</head>
<body>
<h1>{{ summary.response_set }}</h1>
<p>Scoring {{ summary.scoring }}: {{ summary.made | visible }};
{{ "{:,}".format(summary.tokens) }} tokens,
{{ "{:.2%}".format(summary.in_top_k) }} of them in the teacher's top {{ summary.top_k }}.</p>
<div class="wide"><table>
<thead><tr><th>per token</th><th>mean</th>{% for name in quantiles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, values in summary.distributions().items() %}
<tr><td>{{ name }}</td><td>{{ "%.3f" % values.mean }}</td>
{%- for value in values.quantiles.values() %}<td>{{ "%.3f" % value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% for relation, group in (("at least", summary.plausible), ("less than", summary.implausible)) if group %}
<p>Where the teacher's probability is {{ relation }} {{ plausible }}: {{ "{:,}".format(group.entries) }} advantages,
{{ "{:,}".format(group.positive) }} of them positive
{%- if group.mean_positive is not none %}, with the mean {{ "%.3f" % group.mean_positive }};
the largest is {{ "%.3f" % group.largest }}{% endif %}.</p>
{% endfor %}
{% for one in rewards %}
{% if one.warning() %}<p class="warning">Warning: {{ one.of() }}: {{ one.warning() }}</p>
{% else %}<p>{{ one.of() }}: {{ one.describe() }}.</p>
{% endif %}
{% endfor %}
<p class="legend">{{ "log-probability" if summary.token_advantage is none else "advantage" }}
{% for value in summary.legend %}<span style="{{ value | background }}">{{ "%+.2g" % value }}</span>{% endfor %}
{% if summary.token_advantage is none %}(no reference, hence no advantages){% endif %}</p>
<p>Point at a token, or reach it with the Tab key, to see the teacher's choices there.</p>
{% for response in responses %}
<article>
<h2>example {{ response.example_id }}</h2>
<div class="text prompt">{{ response.prompt.strip() | visible("\n") }}</div>
<p class="text">
{%- for token in response.tokens -%}
<span class="token{{ ' special' if token.special }}" tabindex="0" style="{{ token.value | background }}">
{{- token.text | visible("↵\n") -}}
<span class="card">
<span class="row"><span>id</span><span>token</span><span>p</span><span>A</span></span>
{% for one in [token] + token.alternatives -%}
<span class="row"><span>{{ one.id }}</span><span>{{ (one.text | visible).replace(" ", "·") }}</span>
{#- -#}<span>{{ "%.4f" % one.probability }}</span>
{#- -#}<span>{{ "" if one.advantage is none else "%+.3f" % one.advantage }}</span></span>
{% endfor -%}
</span></span>
{%- endfor %}</p>
</article>
{% endfor %}
</body>
</html>
"""


def render_page(summary: SignalSummary, rewards: Sequence[SetRewards], responses: Sequence[InspectedResponse]) -> str:
    """The page: the summary, the reward accuracies, then each response below its prompt, with the teacher's choices."""

    def background(value: float) -> str:
        opacity = STRONGEST * min(abs(value) / summary.colour_scale, 1.0)
        return f"background: rgb({GREEN if value > 0 else RED} / {opacity:.3f})"

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"visible": visible, "background": background}
    return environment.from_string(PAGE).render(
        summary=summary,
        rewards=rewards,
        red=RED,
        responses=responses,
        plausible=PLAUSIBLE,
        quantiles=QUANTILES,
    )

"""Renders the report of ``inspect_cache`` as one HTML page, without scripts or other files."""

import base64
from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from adpa.data.cache.set_records import SetRecord
from adpa.data.inspection import InspectedResponse
from adpa.data.pieces import visible
from adpa.data.public_names import public_name
from adpa.data.reward_accuracy import SetRewards
from adpa.data.summary import PLAUSIBLE, QUANTILES, SignalSummary
from adpa.pipeline.inspected_runs import InspectedRun
from adpa.pipeline.terminal.token_colours import STEPS, TEXTS, ZERO, step

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>adpa: {{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto 16rem; padding: 0 1rem;
  color: light-dark(#16181d, #e8e9ec); background: light-dark(#ffffff, #16181d); }
h1 { font-size: 1.5rem; line-height: 1.3; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .1rem .6rem; text-align: right; font-weight: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1px solid #888; }
.wide { overflow-x: auto; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts td:first-child, .note { color: light-dark(#5a5f69, #a3a8b3); }
.facts td:first-child { white-space: nowrap; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .9rem; }
.prompt { color: light-dark(#5a5f69, #a3a8b3); border-left: 3px solid #888; padding-left: 1rem; }
.token { cursor: default; box-shadow: inset 1px 0 light-dark(#ffffff, #16181d); }
.special { font-style: italic; }
.more::before { content: "⁺"; }
{% for colour in steps %}
.step{{ loop.index0 }} { background: {{ colour }}; color: {{ texts[loop.index0] }}; }
{% endfor %}
.step{{ zero }} { background: none; color: inherit; }
.legend span { padding: .1rem .5rem; border: 1px solid #888; margin-left: -1px; }
.token:hover, .token:focus { outline: 2px solid light-dark(#16181d, #e8e9ec); }
.token > .card { display: none; }
.token:hover > .card, .token:focus > .card { display: block; }
.token:hover > .card { z-index: 1; }
.card { position: fixed; right: 1rem; bottom: 1rem; padding: .6rem; white-space: normal; font-style: normal;
  max-width: calc(100vw - 2rem); box-sizing: border-box; overflow-x: auto;
  border: 1px solid #888; border-radius: 6px;
  color: light-dark(#16181d, #e8e9ec); background: light-dark(#ffffff, #23262d); }
.row { display: grid; grid-template-columns: 5rem 4rem 12rem 6rem 6rem; gap: .6rem; }
.row > * { overflow: hidden; text-overflow: ellipsis; white-space: pre; }
.row > :nth-child(n+4) { text-align: right; }
.row:first-child { border-bottom: 1px solid #888; }
.warning { border-left: 3px solid {{ steps[0] }}; padding-left: 1rem; }
img { max-width: 100%; background: #ffffff; }
</style>
</head>
<body>
<h1>{{ title[0] | upper }}{{ title[1:] }}</h1>
<table class="facts"><tbody>
{% for name, fact in facts.items() %}
<tr><td>{{ name }}</td><td>{{ fact | visible }}</td></tr>
{% endfor %}
</tbody></table>
<h2>Signals of all {{ "{:,}".format(summary.responses) }} responses</h2>
<div class="wide"><table>
<thead><tr><th>per token</th><th>mean</th>{% for name in quantiles %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, values in summary.distributions().items() %}
<tr><td>{{ name }}</td><td>{{ "{:z.3f}".format(values.mean) }}</td>
{%- for value in values.quantiles.values() %}<td>{{ "{:z.3f}".format(value) }}</td>{% endfor %}</tr>
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
<h2>Responses, token by token</h2>
<p class="legend">{{ summary.coloured_by }}
{% for value in summary.legend -%}
<span class="step{{ value | step }}">{{ "%+.2g" % value if value else 0 }}</span>
{%- endfor %}
{% if summary.token_advantage is none %} (no reference, hence no advantages){% endif %}</p>
<p class="note">Point at a token, or reach it with the Tab key. Its card shows the teacher's probability of the token
{%- if summary.token_advantage is not none %}, its advantage (the teacher's log-probability minus the reference's)
{%- endif %} and the teacher's choices there.
{%- if continued %} ⁺ is one more token of the character before it.{% endif %}</p>
{% for response in responses %}
<article>
<h2>example {{ response.example_id }}</h2>
<div class="text prompt">{{ response.prompt.strip() | visible("\n") }}</div>
<p class="text">
{%- for token in response.tokens -%}
<span tabindex="0" class="token step
{{- token.value | step }}{{ ' special' if token.special }}{{ ' more' if token.part > 1 }}">
{{- (token.text or (token.label if token.part == 1 else "")) | visible("↵\n") -}}
<span class="card">
<span class="row"><span></span><span>id</span><span>token</span><span>probability</span>
{%- if token.advantage is not none %}<span>advantage</span>{% endif %}</span>
{% for one in [token] + token.alternatives -%}
<span class="row"><span>{{ "here" if loop.first else "choice %d" % loop.index0 }}</span>
{#- #}<span>{{ one.id }}</span>
{#- #}<span>{{ ((one.label if loop.first else one.text) | visible).replace(" ", "·") }}</span>
{#- #}<span>{{ "%.4f" % one.probability }}</span>
{#- #}{% if one.advantage is not none %}<span>{{ "%+.3f" % one.advantage }}</span>{% endif %}</span>
{% endfor -%}
</span></span>
{%- endfor %}</p>
</article>
{% endfor %}
{% for run, curves in runs %}
<h2>Run {{ run.directory | public | visible }}</h2>
<table class="facts"><tbody>
{% for name, value in run.facts().items() %}
<tr><td>{{ name }}</td><td>{{ (value | public if name == "student" else value) | visible }}</td></tr>
{% endfor %}
</tbody></table>
{% if curves %}<p><img alt="curves of the run" src="data:image/svg+xml;base64,{{ curves | base64 }}"></p>
{% else %}<p class="note">It has no log yet, hence no curves.</p>
{% endif %}
{% endfor %}
</body>
</html>
"""


def render_page(
    summary: SignalSummary,
    record: SetRecord | None,
    rewards: Sequence[SetRewards],
    responses: Sequence[InspectedResponse],
    runs: Sequence[tuple[InspectedRun, str]],
) -> str:
    """The page: summary, reward accuracies, responses with the teacher's choices, runs with their curves.

    A page is made to be sent to others. So it has the names of data and models, and no folder of them.
    """
    facts = {"teacher": public_name(summary.teacher)}
    if summary.reference is not None:
        facts["reference"] = public_name(summary.reference)
    if record is not None:
        facts["data"] = f"{_data_name(record)}, read {record.time[:10]}"
    facts |= {
        "response set": f"{summary.response_set}: {summary.made}",
        "scoring": f"{summary.scoring}, K = {summary.top_k}",
        "tokens": f"{summary.tokens:,}, {summary.in_top_k:.2%} of them in the teacher's top {summary.top_k}",
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "visible": visible,
        "public": public_name,
        "base64": lambda text: base64.b64encode(text.encode()).decode(),
        "step": lambda value: step(value, summary.colour_scale),
    }
    return environment.from_string(PAGE).render(
        title=visible(page_title(summary, record)),
        facts=facts,
        summary=summary,
        rewards=rewards,
        responses=responses,
        runs=runs,
        continued=any(token.part > 1 for response in responses for token in response.tokens),
        steps=STEPS,
        zero=ZERO,
        texts=TEXTS,
        plausible=PLAUSIBLE,
        quantiles=QUANTILES,
    )


def page_title(summary: SignalSummary, record: SetRecord | None) -> str:
    """What a page shows: ``advantages of dpo over sft on chosen responses of prefs.jsonl``."""
    shown = f"log-probabilities of {public_name(summary.teacher)}"
    if summary.reference is not None:
        shown = f"advantages of {public_name(summary.teacher)} over {public_name(summary.reference)}"
    of = "" if record is None else f" of {_data_name(record)}"
    return f"{shown} on {summary.response_set.partition('-')[0]} responses{of}"


def _data_name(record: SetRecord) -> str:
    name = public_name(record.data)
    return name if record.split is None else f"{name} split {record.split}"

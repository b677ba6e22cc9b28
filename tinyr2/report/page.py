"""The page: style and template of report.html. No script, no outside resource, nothing marked as safe.

The template sees prepared values only (`html.py`) and runs with autoescape on, so model text stays text.
"""

STYLE = """
:root { color-scheme: light dark; --bg: #f7f7f5; --card: #ffffff; --ink: #22262b; --dim: #6a7078; --rule: #e4e5e1;
  --grid: #ececea; --good: #2e7d5b; --warn: #b7791f; --bad: #c0392b; --soft: #f1f1ee;
  --c0: #2f6f9f; --c1: #c8702a; --c2: #4a8f5b; --c3: #8a5fa8; --c4: #a8485a; --c5: #6b7280;
  --over: 222, 120, 25; --under: 45, 115, 190; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181b; --card: #1d2024; --ink: #dfe2e6; --dim: #949ba5;
  --rule: #2f343a; --grid: #282c31; --good: #6cc29a; --warn: #e0b155; --bad: #ef7d70; --soft: #24282d;
  --c0: #74b3de; --c1: #e9a15f; --c2: #86c795; --c3: #bf9bdb; --c4: #e08c9b; --c5: #a3aab4;
  --over: 235, 140, 50; --under: 80, 150, 225; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; font-weight: 650; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; font-weight: 650; margin: 40px 0 12px; }
a { color: var(--c0); }
.dim { color: var(--dim); }
.facts { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 14px 0 0; }
.facts div { min-width: 0; overflow-wrap: anywhere; }
.facts dt { color: var(--dim); font-size: 12.5px; }
.facts dd { margin: 0; font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--dim); font-weight: 500; font-size: 13px; border-bottom: 1px solid var(--rule); }
tbody tr + tr td { border-top: 1px solid var(--grid); }
.left td, .left th { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 13px; }
figcaption b { font-weight: 600; }
.keys { color: var(--dim); font-variant-numeric: tabular-nums; }
.keys i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 10px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { fill: var(--dim); font-size: 10.5px; font-family: inherit; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--grid); stroke-width: 1; }
.mark { stroke: var(--warn); stroke-width: 1; stroke-dasharray: 2 3; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.s0 { stroke: var(--c0); background: var(--c0); } .s1 { stroke: var(--c1); background: var(--c1); }
.s2 { stroke: var(--c2); background: var(--c2); } .s3 { stroke: var(--c3); background: var(--c3); }
.s4 { stroke: var(--c4); background: var(--c4); } .s5 { stroke: var(--c5); background: var(--c5); }
circle { fill: var(--card); stroke-width: 1.8; }
.alarm { border-left: 4px solid var(--warn); margin-bottom: 10px; }
.alarm.critical { border-left-color: var(--bad); }
.alarm p { margin: 2px 0 0; overflow-wrap: anywhere; }
.chip { display: inline-block; padding: 0 9px; border-radius: 99px; background: var(--soft); font-size: 12.5px;
  line-height: 21px; font-variant-numeric: tabular-nums; }
.chip.good { color: var(--good); } .chip.warn { color: var(--warn); } .chip.critical { color: var(--bad); }
details { margin-bottom: 10px; }
summary { cursor: pointer; overflow-wrap: anywhere; }
.text, pre { font: 13px/1.65 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 8px 0 0; }
.prompt { color: var(--dim); border-left: 2px solid var(--rule); padding-left: 10px; }
.scroll { max-height: 460px; overflow-y: auto; }
.t { border-radius: 3px; padding: 1px 0; }
.p1 { background: rgba(var(--over), 0.14); } .p2 { background: rgba(var(--over), 0.28); }
.p3 { background: rgba(var(--over), 0.44); } .p4 { background: rgba(var(--over), 0.62); }
.n1 { background: rgba(var(--under), 0.14); } .n2 { background: rgba(var(--under), 0.28); }
.n3 { background: rgba(var(--under), 0.44); } .n4 { background: rgba(var(--under), 0.62); }
.legend { font-size: 13px; margin: 0 0 12px; }
.legend .t { padding: 2px 8px; margin: 0 1px; font-variant-numeric: tabular-nums; }
"""

TEMPLATE = """{% macro chart(c) %}
<figure class="card">
<figcaption><b>{{ c.title }}{% if c.logarithmic %} <span class="dim">(log)</span>{% endif %}</b>
<span class="keys">{% for line in c.lines %}<span>{% if c.lines | length > 1 %}<i class="s{{ loop.index0 % 6 }}"></i>\
{{ line.name }} {% endif %}{{ line.last }}{% if line.missing %} ({{ line.missing }} not finite){% endif %}</span>
{% endfor %}</span></figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" role="img" aria-label="{{ c.title }} by step">
{% for y, label in c.y_ticks %}<line class="grid" x1="{{ left }}" x2="{{ right }}" y1="{{ y }}" y2="{{ y }}"/>\
<text x="{{ left - 6 }}" y="{{ y }}" dy="3.5" text-anchor="end">{{ label }}</text>
{% endfor %}
{% for x, label in c.x_ticks %}<text x="{{ x }}" y="{{ bottom + 16 }}" text-anchor="middle">{{ label }}</text>
{% endfor %}
{% for x in c.marks %}<line class="mark" x1="{{ x }}" x2="{{ x }}" y1="{{ top }}" y2="{{ bottom }}"/>
{% endfor %}
{% for line in c.lines %}{% set n = loop.index0 % 6 %}
{% for path in line.paths %}<polyline class="s{{ n }}" points="{{ path }}"/>
{% endfor %}
{% for x, y, label in line.dots %}<circle class="s{{ n }}" cx="{{ x }}" cy="{{ y }}" r="2.8"><title>{{ line.name }}, \
{{ label }}</title></circle>
{% endfor %}
{% endfor %}
</svg></figure>
{% endmacro %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="referrer" content="no-referrer">
<title>{{ name }} · tinyr2</title>
<style>""" + STYLE + """</style></head><body><main>
<header><h1>{{ name }}</h1><div class="dim">tinyr2 run report</div>
<dl class="facts">{% for label, value in facts %}<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl></header>
{% if table %}
<h2>Result</h2><div class="card wide"><table><thead><tr><th></th>{% for column in table.columns %}<th>{{ column }}</th>\
{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}<tr><td>{% if row.name in links %}<a href="{{ links[row.name] }}">{{ row.name }}</a>\
{% else %}{{ row.name }}{% endif %}</td>{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endif %}
{% if alarms %}
<h2>Alarms</h2>
{% for alarm in alarms %}<div class="card alarm {{ alarm.level }}">
<span class="chip {{ alarm.level }}">{{ alarm.level }}</span>
<b>{{ alarm.name }}</b> <span class="dim">at step {{ alarm.step }}</span><p>{{ alarm.evidence }}</p>
<p class="dim">{{ alarm.action }}</p></div>
{% endfor %}
{% endif %}
{% if charts %}
<h2>Curves</h2><div class="charts">{% for c in charts %}{{ chart(c) }}{% endfor %}</div>
{% endif %}
{% if more %}
<details><summary class="dim">More curves</summary>
<div class="charts">{% for c in more %}{{ chart(c) }}{% endfor %}</div></details>
{% endif %}
{% if samples %}
<h2>Sample completions</h2>
{% if legend %}<p class="legend">Disagreement with the teacher at each token, in nats:
{% for name, label in legend %}<span class="t {{ name }}">{{ label }}</span>{% endfor %}
<span class="dim">orange: the student is surer of the token than the teacher; blue: the teacher is surer; point at a
token for its value</span></p>{% endif %}
{% for s in samples %}<details class="card"{% if loop.index <= 4 %} open{% endif %}><summary>step {{ s.step }}
<span class="chip {{ s.grade }}">{{ s.reward }}</span> <span class="chip">{{ s.finish }}</span>
{% if s.mean %}<span class="chip">{{ s.mean }}</span>{% endif %} <span class="dim">{{ s.about }}</span></summary>
<div class="text prompt">{{ s.prompt }}</div>
<div class="text scroll">{% if s.tokens %}{% for text, name, label in s.tokens %}<span class="t {{ name }}" \
title="{{ label }}">{{ text }}</span>{% endfor %}{% else %}{{ s.completion }}{% endif %}\
{% if s.left_out %}<span class="dim"> … {{ s.left_out }}</span>{% endif %}</div></details>
{% endfor %}
{% endif %}
{% if events %}
<h2>Events</h2><details class="card"><summary>{{ events | length }} newest</summary><table class="left"><tbody>
{% for step, event, rest in events %}<tr><td>{{ step }}</td><td>{{ event }}</td><td class="dim">{{ rest }}</td></tr>
{% endfor %}</tbody></table></details>
{% endif %}
{% if config or env %}<h2>Configuration and machine</h2>{% endif %}
{% if config %}<details class="card"><summary>Resolved config</summary><pre>{{ config }}</pre></details>{% endif %}
{% if env %}<details class="card"><summary>Environment</summary><table class="left"><tbody>
{% for key, value in env %}<tr><td class="dim">{{ key }}</td><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></details>{% endif %}
</main></body></html>
"""

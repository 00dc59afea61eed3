"""HTML pages of one file each: their style, tables and pictures.

A page needs no network, no other file and no script, and whatever text it is
given is escaped. Not here: what pages say (`route_page.py`, `run_page.py`).
"""

import base64
from typing import Any

import jinja2

ROUTES = 'routes.html'  # name of the page of a trace
LONG = 80  # rows, from which on a table is folded
_TYPES = {'png': 'image/png', 'svg': 'image/svg+xml'}

_BASE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #595959;
  --line: #0072B2; --head: #e8f1f8; --even: #f5f5f5; --edge: #ddd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #16181b;
  --faint: #a8a8a8; --line: #56B4E9; --head: #22303b; --even: #1f2226;
  --edge: #3a3d42; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1100px; margin: 2em auto;
  padding: 0 1em; overflow-wrap: break-word; }
h1, h2, h3, h4 { line-height: 1.2; }
h1 { overflow-wrap: anywhere; }
h2 { border-bottom: 2px solid var(--line); padding-bottom: .2em;
  margin-top: 2em; }
h3 { margin-top: 2em; }
a { color: var(--line); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figure { margin: 1em 0; }
nav a { margin-right: 1em; }
pre { background: var(--even); border: 1px solid var(--edge);
  border-radius: 4px; padding: .6em .8em; font-size: 13px; margin: .5em 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 32em; margin: .5em 0 1.5em; }
table { border-collapse: collapse; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap;
  vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--head); }
th.left, td.left { text-align: left; }
tbody tr:nth-child(even) { background: var(--even); }
.note { color: var(--faint); font-size: 14px; max-width: 50em; }
summary { cursor: pointer; font-weight: bold; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444;
    --line: #0072B2; --head: #eee; --even: #f5f5f5; --edge: #bbb; }
  body { font-size: 10.5pt; max-width: none; margin: 0; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; max-height: none; }
  thead th { position: static; }
  table { font-size: 8.5pt; }
  td, th { white-space: normal; overflow-wrap: anywhere; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
}
{% block style %}{% endblock %}
</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""
_TABLE = """\
{% macro show(table) %}
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}

<div class="scroll"><table>
<thead><tr>{% for heading in table.columns %}
<th{% if heading in table.left %} class="left"{% endif %}>{{ heading }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in table.cells() %}<tr>
{%- for heading, cell in zip(table.columns, row) -%}
<td{% if heading in table.left %} class="left"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endmacro %}
{% macro titled(table) %}
{% if table.rows|length > long %}
<details><summary>{{ table.title }} ({{ table.rows|length }} rows)</summary>
{{ show(table) }}
</details>
{% else %}
<h4>{{ table.title }}</h4>
{{ show(table) }}
{% endif %}
{% endmacro %}
"""
# A page's own template begins with this; its blocks are 'style' and 'body'.
HEAD = """\
{% extends 'base' %}
{% from 'tables' import show, titled %}
"""


def render(template: str, *, title: str, **values: Any) -> str:
  """A page.

  Args:
    template: The blocks of the page's template, without `HEAD`.
    title: The title of the page.
    **values: The other values of the template.
  """
  loader = jinja2.DictLoader(
    {'base': _BASE, 'tables': _TABLE, 'page': HEAD + template}
  )
  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    loader=loader,
  )
  environment.globals.update(zip=zip, long=LONG)
  return environment.get_template('page').render(title=title, **values)


def data_uri(data: bytes, form: str = 'png') -> str:
  """The address of a picture that holds the picture itself."""
  return f'data:{_TYPES[form]};base64,{base64.b64encode(data).decode()}'

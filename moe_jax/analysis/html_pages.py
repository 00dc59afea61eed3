"""HTML pages of one file each: their style, tables and pictures.

A page needs no network and no other file, and whatever text it is given is
escaped. Browsers refuse every script but the one that `render` is given. Not
here: what pages say (`route_page.py`, `run_page.py`).
"""

import base64
import hashlib
from typing import Any

import jinja2

ROUTES = 'routes.html'  # name of the page of a trace
LONG = 80  # tables with more rows are folded
_TYPES = {'png': 'image/png', 'svg': 'image/svg+xml'}

_BASE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'
{%- if script %}; script-src 'sha256-{{ digest }}'{% endif %}">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#222, #e4e4e4);
  --paper: light-dark(#fff, #16181b); --faint: light-dark(#595959, #a8a8a8);
  --line: light-dark(#0072b2, #56b4e9); --head: light-dark(#e8f1f8, #22303b);
  --even: light-dark(#f5f5f5, #1f2226); --edge: light-dark(#ddd, #3a3d42); }
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
@media (max-width: 40em) {
  .scroll { max-height: none; }
}
@media print {
  :root { color-scheme: light !important; --ink: #000; --faint: #444;
    --head: #eee; --edge: #bbb; }
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
{% if script %}<script>{{ script|safe }}</script>{% endif %}

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


def render(
  template: str, *, title: str, script: str = '', **values: Any
) -> str:
  """The HTML of a page.

  Args:
    template: The blocks of the page's template, without `HEAD`.
    title: The title of the page.
    script: JavaScript that runs when the page is there; '' for none.
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
  digest = hashlib.sha256(script.encode()).digest()
  return environment.get_template('page').render(
    title=title,
    script=script,
    digest=base64.b64encode(digest).decode(),
    **values,
  )


def data_uri(data: bytes, form: str = 'png') -> str:
  """The address of a picture that holds the picture itself."""
  return f'data:{_TYPES[form]};base64,{base64.b64encode(data).decode()}'

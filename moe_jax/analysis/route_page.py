"""A report's sections, printed, and written as Markdown, CSV, PNG and a page.

The page is one HTML file with its pictures in it: it needs no network, no other
file and no script. Not here: the sections (`route_sections.py`).
"""

import base64
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from moe_jax.analysis.route_sections import Section

_DPI = 110
_LONG = 80  # rows, from which on a table is folded
_PRINTED = 100  # rows of the largest table that is printed
PAGE, TEXT = 'routes.html', 'routes.md'

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px;
  margin: 2em auto; padding: 0 1em; }
h1, h2, h3, h4 { line-height: 1.2; }
h2 { border-bottom: 2px solid #0072B2; padding-bottom: .2em; margin-top: 2em; }
h3 { margin-top: 2em; }
img { max-width: 100%; height: auto; }
figure { margin: 1em 0; }
nav a { margin-right: 1em; }
.scroll { overflow: auto; max-height: 32em; margin: .5em 0 1.5em; }
table { border-collapse: collapse; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; white-space: nowrap; }
thead th { position: sticky; top: 0; background: #eef4f8; }
th.left, td.left { text-align: left; }
tbody tr:nth-child(even) { background: #f6f6f6; }
.note { color: #555; font-size: 14px; max-width: 50em; }
summary { cursor: pointer; font-weight: bold; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for part in parts %}
<h2 id="part-{{ loop.index }}">{{ part.title }}</h2>
{% for line in part.facts %}<p>{{ line }}</p>
{% endfor %}
{% set number = loop.index %}
<nav>{% for section in part.sections %}
<a href="#part-{{ number }}-{{ section.name }}">{{ section.title }}</a>
{% endfor %}</nav>
{% for section in part.sections %}
<section id="part-{{ number }}-{{ section.name }}">
<h3>{{ section.title }}</h3>
{% for sentence in section.sentences %}<p>{{ sentence }}</p>
{% endfor %}
{% for name in section.figures %}
<figure><img alt="{{ section.title }}: {{ name.replace('_', ' ') }}"
 src="data:image/png;base64,{{ pictures[number - 1][name] }}"></figure>
{% endfor %}
{% for table in section.tables %}
{% if table.rows|length > long %}
<details><summary>{{ table.title }} ({{ table.rows|length }} rows)</summary>
{{ show(table) }}
</details>
{% else %}
<h4>{{ table.title }}</h4>
{{ show(table) }}
{% endif %}
{% endfor %}
</section>
{% endfor %}
{% endfor %}
</body>
</html>
"""
_TABLE = """\
<p class="note">{{ table.note }}</p>
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
"""


class Part(NamedTuple):
  """The part of a report that is about one trace, or about several.

  Attributes:
    name: The beginning of the names of its files; may be empty.
    title: One line that names the trace.
    facts: Sentences on what the trace is of.
    sections: Its sections.
  """

  name: str
  title: str
  facts: list[str]
  sections: list[Section]


def write(folder: pathlib.Path, title: str, parts: Sequence[Part]) -> None:
  """Writes a report into a folder, which is made if it is missing.

  Args:
    folder: The folder.
    title: The title of the page.
    parts: The parts of the report.
  """
  folder.mkdir(parents=True, exist_ok=True)
  pictures: list[dict[str, bytes]] = []
  for part in parts:
    figures = {n: f for s in part.sections for n, f in s.figures.items()}
    pictures.append({name: _png(figure) for name, figure in figures.items()})
    for name, data in pictures[-1].items():
      (folder / f'{part.name}{name}.png').write_bytes(data)
    for section in part.sections:
      for table in section.tables:
        path = folder / f'{part.name}{table.name}.csv'
        path.write_text(table.csv(), encoding='utf-8')
  (folder / TEXT).write_text(markdown(title, parts), encoding='utf-8')
  page = html(title, parts, pictures)
  (folder / PAGE).write_text(page, encoding='utf-8')


def html(
  title: str,
  parts: Sequence[Part],
  pictures: Sequence[dict[str, bytes]],
) -> str:
  """The page of a report.

  Args:
    title: Its title.
    parts: The parts of the report.
    pictures: The pictures of each part by their names, as PNG.
  """
  environment = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  )
  environment.globals['zip'] = zip
  table = environment.from_string(_TABLE)
  environment.globals['show'] = lambda one: Markup(table.render(table=one))
  encoded = [
    {name: base64.b64encode(data).decode() for name, data in own.items()}
    for own in pictures
  ]
  return environment.from_string(_TEMPLATE).render(
    title=title, parts=parts, pictures=encoded, long=_LONG
  )


def markdown(title: str, parts: Sequence[Part]) -> str:
  """The sentences and tables of a report; long tables are CSV alone."""
  lines = [f'# {title}']
  for part in parts:
    lines += ['', f'# {part.title}', '', *part.facts]
    for section in part.sections:
      for sentence in [f'# {section.title}', *section.sentences]:
        lines += ['', sentence]
      for name in section.figures:
        path = f'{part.name}{name}.png'
        lines += ['', f'![{section.title}: {name.replace("_", " ")}]({path})']
      for table in section.tables:
        name = f'{part.name}{table.name}.csv'
        long = [f'## {table.title}', '', f'{len(table.rows)} rows: `{name}`']
        text = table.markdown() if len(table.rows) <= _PRINTED else None
        lines += ['', text or '\n'.join(long)]
  return '\n'.join(lines).rstrip() + '\n'


def show(console: Console, parts: Sequence[Part]) -> None:
  """Prints the sentences and tables of a report, without long tables."""
  for part in parts:
    console.rule(part.title, align='left')
    for fact in part.facts:
      console.print(fact, markup=False, highlight=False)
    for section in part.sections:
      console.print(f'\n{section.title}', style='bold', markup=False)
      for sentence in section.sentences:
        console.print(sentence, markup=False, highlight=False)
      for table in section.tables:
        if len(table.rows) <= _PRINTED:
          console.print(table.terminal())


def _png(figure: Figure) -> bytes:
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=_DPI)
  return data.getvalue()

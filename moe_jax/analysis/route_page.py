"""A report's sections, printed, and written as Markdown, CSV, PNG and a page.

The page is one HTML file with its pictures in it: it needs no network, no other
file and no script. Not here: the sections (`route_sections.py`).
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.rule import Rule

from moe_jax.analysis import html_pages, plot_style, text_tables
from moe_jax.analysis.route_sections import Section

_MAX_PRINTED = 100  # rows of the largest table that is printed
_NUM_UNFOLDED = 4  # texts of a section that are open from the start
PAGE, TEXT = html_pages.ROUTES, 'routes.md'

_TEMPLATE = """\
{% block style %}
pre sub { font-size: 8.5px; color: #333; }
{% endblock %}
{% block body %}
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
 src="{{ pictures[number - 1][name] }}"></figure>
{% endfor %}
{% for title, text in section.texts.items() %}
<details{% if loop.index <= unfolded %} open{% endif %}>
<summary>{{ title }}</summary>
{{ text|safe }}
</details>
{% endfor %}
{% for table in section.tables %}
{{ titled(table) }}
{% endfor %}
</section>
{% endfor %}
{% endfor %}
{% endblock %}
"""


class Part(NamedTuple):
  """The part of a report that is about one trace, or about several.

  Attributes:
    name: The beginning of the names of its files; may be empty.
    title: One line that names the trace.
    facts: Sentences on the content of the trace.
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
    pictures.append(
      {name: plot_style.picture(figure) for name, figure in figures.items()}
    )
    for name, png in pictures[-1].items():
      (folder / f'{part.name}{name}.png').write_bytes(png)
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
  encoded = [
    {name: html_pages.data_uri(png) for name, png in part_pictures.items()}
    for part_pictures in pictures
  ]
  return html_pages.render(
    _TEMPLATE,
    title=title,
    parts=parts,
    pictures=encoded,
    unfolded=_NUM_UNFOLDED,
  )


def markdown(title: str, parts: Sequence[Part]) -> str:
  """The sentences and tables of a report; long tables are CSV alone."""
  lines = [f'# {title}']
  for part in parts:
    lines += ['', f'# {part.title}', '', *part.facts]
    for section in part.sections:
      for sentence in [f'# {section.title}', *_sentences(section)]:
        lines += ['', sentence]
      for name in section.figures:
        path = f'{part.name}{name}.png'
        lines += ['', f'![{section.title}: {name.replace("_", " ")}]({path})']
      for table in section.tables:
        name = f'{part.name}{table.name}.csv'
        pointer = [f'## {table.title}', '', f'{len(table.rows)} rows: `{name}`']
        text = table.markdown() if len(table.rows) <= _MAX_PRINTED else None
        lines += ['', text or '\n'.join(pointer)]
  return '\n'.join(lines).rstrip() + '\n'


def show(console: Console, parts: Sequence[Part]) -> None:
  """Prints the sentences and tables of a report, without long tables."""
  width = None if console.is_terminal else text_tables.PROSE
  style = {'markup': False, 'highlight': False, 'width': width}
  for part in parts:
    console.print(Rule(part.title, align='left'), width=width)
    for fact in part.facts:
      console.print(fact, **style)
    for section in part.sections:
      console.print(f'\n{section.title}', style='bold', **style)
      for sentence in _sentences(section):
        console.print(sentence, **style)
      for table in section.tables:
        if len(table.rows) <= _MAX_PRINTED:
          console.print(table.terminal())


def _sentences(section: Section) -> list[str]:
  """The sentences of a section, with the page that has its coloured texts."""
  return [f'It is in {PAGE}.'] * bool(section.texts) + section.sentences

"""HTML pages of experiments: one file each, dark or light, tables that sort.

Not here: what pages say (`report_page.py`, `experiments/compare.py`), and the
style that they share with the page of a run (`moe_jax/analysis/html_pages.py`).
"""

import re
from collections.abc import Sequence
from typing import Any

import markupsafe

from moe_jax.analysis import html_pages, inline_svg
from moe_jax.analysis.text_tables import ValueTable

_STYLE = (
  """\
#scheme { float: right; font: inherit; color: inherit; padding: .3em .8em;
  background: var(--head); border: 1px solid var(--faint); border-radius: 4px; }
th button { all: unset; cursor: pointer; }
th button::after { content: ' ⇅'; color: var(--faint); }
th[aria-sort=ascending] button::after { content: ' ↑'; }
th[aria-sort=descending] button::after { content: ' ↓'; }
:focus-visible, th button:focus-visible { outline: 2px solid var(--line);
  outline-offset: 2px; }
.panels { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
figcaption { color: var(--faint); font-size: 14px; max-width: 50em; }
.prose td { white-space: normal; }
.prose td.left { min-width: 11em; }
.scroll tbody tr { background: var(--paper); }
.scroll tbody tr:nth-child(even) { background: var(--even); }
.scroll td:first-child { position: sticky; left: 0; background: inherit;
  white-space: normal; min-width: min(14em, 35vw); }
@media (max-width: 600px) { /* A row of prose is a card, each cell a line. */
  .prose thead { display: none; }
  .prose :is(table, tbody, tr, td) { display: block; }
  .prose tbody tr { padding: .4em 0; border-top: 1px solid var(--edge); }
  .prose .scroll td { position: static; text-align: left; padding: .1em .4em; }
  .prose td:first-child { font-weight: bold; }
  .prose td:empty { display: none; }
  .prose td:not(:first-child)::before { color: var(--faint);
    content: attr(data-heading) ': '; } }
"""
  + inline_svg.STYLE
)
_TOGGLE = """\
<button id="scheme" type="button" hidden>dark or light</button>
"""
_SCRIPT = """
'use strict';
const root = document.documentElement;
const scheme = document.getElementById('scheme');
scheme.hidden = false;
scheme.addEventListener('click', () => {
  const now = root.style.colorScheme ||
    (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');
  root.style.colorScheme = now === 'dark' ? 'light' : 'dark';
});
const number = text => parseFloat(text.replaceAll(',', ''));
const compare = (a, b) => {
  const difference = number(a) - number(b);
  return isNaN(difference) ? a.localeCompare(b) : difference;
};
for (const table of document.querySelectorAll('table')) {
  if (!table.tHead) continue;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  heads.forEach((head, i) => {
    for (const row of rows) row.cells[i].dataset.heading = head.textContent;
    const button = document.createElement('button');
    button.type = 'button';
    button.append(head.textContent || 'row');
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const order = { ascending: 'descending', descending: '' }[
        head.getAttribute('aria-sort')] ?? 'ascending';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      if (order) head.setAttribute('aria-sort', order);
      const sign = order === 'descending' ? -1 : 1;
      const text = row => row.cells[i].textContent.trim();
      // Cells without a value stay at the end, and a third click undoes all.
      const sorted = !order ? rows : [...rows].sort((a, b) =>
        !text(a) - !text(b) || sign * compare(text(a), text(b)));
      body.append(...sorted);
    });
  });
}
"""


def render(body: str, *, title: str, style: str = '', **values: Any) -> str:
  """A page.

  Args:
    body: The template of its body; it has the macros of `html_pages`.
    title: The title of the page.
    style: CSS beside that of all pages.
    **values: The other values of the template.
  """
  template = (
    f'{{% block style %}}{_STYLE}{style}{{% endblock %}}'
    f'{{% block body %}}{_TOGGLE}{body}{{% endblock %}}'
  )
  return html_pages.render(template, title=title, script=_SCRIPT, **values)


def svg(figure: Any, name: str, label: str) -> markupsafe.Markup:
  """A figure within a page; see `inline_svg`."""
  name = re.sub(r'\W+', '-', name)
  return markupsafe.Markup(inline_svg.inline_svg(figure, name, label))


def code(text: str) -> markupsafe.Markup:
  """Text as HTML, in which words in backticks are code."""
  escaped = str(markupsafe.escape(text))
  return markupsafe.Markup(re.sub('`([^`]+)`', r'<code>\1</code>', escaped))


def table(
  name: str,
  lines: Sequence[dict[str, str]],
  left_aligned: Sequence[str] = (),
  title: str = '',
  note: str = '',
) -> ValueTable:
  """A table of lines of cells by heading.

  Args:
    name: Name of the table.
    lines: The lines, each with its cells by heading.
    left_aligned: Headings of the columns that are aligned left.
    title: Title of the table.
    note: Text that stands with the table.
  """
  columns = {key: '' if key in left_aligned else '>' for key in lines[0]}
  rows = [list(line.values()) for line in lines]
  return ValueTable(name, title, note, columns, rows)

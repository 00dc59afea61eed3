"""Compares runs: configs, losses, routers, and seeds in pairs.

    python -m experiments.compare runs/switch runs/dense
    python -m experiments.compare results/eval_capacity/runs/*/seed* \
      --output=compared

The first form prints tables; with --output the same stands, with the curves, in
`compared.html` of that folder, which needs no network. Runs whose configs
differ in nothing but the seed are a group, and where two groups have runs of
equal seeds, their last metrics are compared in pairs. Not here: what is
compared (`study/compared_runs.py`, `study/compared_tables.py`).
"""

import pathlib
from collections.abc import Sequence

from absl import logging

from experiments.study import compared_runs, compared_tables, pages
from moe_jax import command_line
from moe_jax.analysis import text_tables

PAGE = 'compared.html'
_BODY = """\
<h1>{{ title }}</h1>
{{ titled(tables[0]) }}
<h2>Curves</h2>
<figure><div class="panels">{% for curve in curves %}{{ curve }}{% endfor %}
</div><figcaption>A line for each run, in the colour of its group; noisy lines
are running means.</figcaption></figure>
<h2>Tables</h2>
<div class="prose">{% for table in tables[1:] %}{{ titled(table) }}
{% endfor %}</div>
"""


def html(groups: compared_runs.Groups) -> str:
  """The page of a comparison."""
  return pages.render(
    _BODY,
    title='Runs side by side',
    tables=compared_tables.tables(groups),
    curves=[
      pages.svg(figure, key, f'{key} over steps, a line for each run')
      for key, figure in compared_tables.curves(groups)
    ],
  )


@command_line.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Prints a comparison, and writes its page."""
  parser = command_line.Parser(
    prog='python -m experiments.compare', **command_line.about(__doc__)
  )
  parser.add_argument('runs', metavar='RUN', nargs='+', help='folder of a run')
  parser.add_argument('--output', default='', help=f'folder of {PAGE}')
  options = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)
  if len(options.runs) < 2:
    parser.error(f'one run is given, {options.runs[0]}; give at least two')
  groups = compared_runs.read([pathlib.Path(run) for run in options.runs])
  console = text_tables.wide_console()
  for table in compared_tables.tables(groups):
    console.print(table.terminal())
    if table.note:
      console.print(table.note.replace('\n', ' '), highlight=False)
  if options.output:
    path = pathlib.Path(options.output) / PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(groups), encoding='utf-8')
    print(f'written: {path}')


if __name__ == '__main__':
  main()

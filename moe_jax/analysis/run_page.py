"""One page on a run: `index.html` in its folder, from what the folder has.

    python -m moe_jax.analysis.run_page runs/tiny

makes it anew, such as for a run of an earlier version; in a notebook,
`run_page.page('runs/tiny')` shows it. The page needs no other file and no
network. Not here: what it says (`run_sections.py`), and when a run writes it
(`page_hook.py`).
"""

import html as html_lib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from absl import logging

from moe_jax import command_line
from moe_jax.analysis import (
  html_pages,
  plot_style,
  plots,
  run_commands,
  run_facts,
  run_files,
  run_sections,
)
from moe_jax.analysis.run_files import CURVES, LOAD, PAGE
from moe_jax.analysis.run_sections import RunFolder
from moe_jax.runs import workdir as workdir_lib

_LOAD_WIDTH = 5.4  # inches, of the picture of the load on the page

_TEMPLATE = """\
{% block style %}
.facts { display: grid; gap: .6em 1.5em; margin: 1em 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 9em), 1fr)); }
.facts div { border-left: 3px solid var(--line); padding-left: .6em; }
.facts dt { color: var(--faint); font-size: 13px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.state { font-size: 1.1em; font-weight: 600; }
.charts { display: grid; gap: 1em;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25em), 1fr)); }
.charts figure { margin: 0; }
.charts img, .wide img { width: 100%; }
.wide { max-width: 46em; }
.options td { white-space: normal; overflow-wrap: anywhere; }
.options td:first-child { min-width: 9em; max-width: 26em; }
.options th { overflow-wrap: normal; }
.command { white-space: pre; overflow-x: auto; }
.options .note { display: block; font-size: 12px; }
@media print { .command { white-space: pre-wrap; }
  .charts { grid-template-columns: 1fr 1fr; }
  .facts { grid-template-columns: 1fr 1fr 1fr; } .wide { max-width: 13cm; } }
{% endblock %}
{% block body %}
<h1>{{ title }}</h1>
<p class="state">{{ state }}</p>
{% if run.facts.said %}<pre>{{ run.facts.said }}</pre>{% endif %}

<dl class="facts">{% for one in headline %}
<div><dt>{{ one.name }}</dt><dd>{{ one.value }}</dd></div>{% endfor %}</dl>
<nav>{% for name in ['Curves', 'Load', 'Routing', 'Sample', 'Config',
 'Environment', 'Files', 'How to go on'] %}
{% if name != 'Load' or load %}
<a href="#{{ name|replace(' ', '-') }}">{{ name }}</a>
{% endif %}{% endfor %}</nav>

<h2 id="Curves">Curves</h2>
{% if charts %}<div class="charts">{% for name, uri in charts %}
<figure><img alt="{{ name }}" src="{{ uri }}"></figure>{% endfor %}</div>
<p class="note">The last losses are those that the run printed. A row is the
mean over the steps since the row before.</p>
{% else %}<p>Nothing has been logged yet.</p>{% endif %}

{% if evaluations %}<h3>Evaluations</h3>{{ show(evaluations) }}{% endif %}

{% if load %}<h2 id="Load">Load</h2>
<p class="note">The share of all choices that each expert gets before any is
dropped, over the uniform share. {{ how_to_read }}</p>
<figure class="wide"><img alt="Load of each expert over steps"
 src="{{ load }}"></figure>{% endif %}

<h2 id="Routing">Routing</h2>
{% for text in warnings %}<p><strong>Warning:</strong> {{ text }}.</p>
{% endfor %}
{% for table in routing %}{{ titled(table) }}{% endfor %}
{% if not routing %}<p>{{ 'The report is written at the end of the run.'
 if run.facts.is_sparse else 'The model has no routers that it reports on.'
 }}</p>{% endif %}
{% if linked %}{% for page in trace_pages %}
<p>Token by token: <a href="./{{ page|urlencode }}">{{ page }}</a></p>
{% endfor %}{% endif %}

<h2 id="Sample">Sample</h2>
{% if sample %}<pre>{{ sample }}</pre>
{% else %}<p>None: {{ 'it is drawn at the end of the run.'
 if run.facts.generates else 'the model writes no text.' }}</p>{% endif %}

<h2 id="Config">Config</h2>
{% if problem %}<p>What differs from the defaults is not known: {{ problem }}
</p>{% else %}
<p class="note">What differs from the defaults.</p>
<div class="scroll options"><table>
<thead><tr><th class="left">key</th><th class="left">value</th>
<th class="left">default</th></tr></thead><tbody>
{% for one in options %}<tr><td class="left"><code>{{ one.key }}</code>
<span class="note">{{ one.sentence }}</span></td>
<td class="left">{{ one.value }}</td><td class="left">{{ one.default }}</td>
</tr>{% endfor %}</tbody></table></div>{% endif %}
<details><summary>The whole config</summary><pre>{{ config }}</pre></details>

<h2 id="Environment">Environment</h2>
{% if environment %}<dl class="facts">{% for one in environment %}
<div><dt>{{ one.name }}</dt><dd>{{ one.value }}</dd></div>{% endfor %}</dl>
{% else %}<p>It was not written down.</p>{% endif %}

<h2 id="Files">Files</h2>
<div class="options"><table><tbody>{% for file in files %}<tr><td class="left">
{% if linked and file.is_link %}
<a href="./{{ file.name|urlencode }}">{{ file.name }}</a>
{% else %}{{ file.name }}{% endif %}</td>
<td class="left">{{ file.purpose }}</td></tr>{% endfor %}</tbody></table></div>

<h2 id="How-to-go-on">How to go on</h2>
<p class="note">Commands are for the folder in which <code>{{ name }}</code> is,
in a checkout or with the package installed.</p>
{% for one in commands %}<h4>{{ one.title }}</h4>
{% if one.note %}<p class="note">{{ one.note }}</p>{% endif %}

{% for line in one.lines %}<pre class="command">{{ line }}</pre>
{% endfor %}{% endfor %}
<p class="note">Written {{ now }}.</p>
{% endblock %}
"""


class RunPage(NamedTuple):
  """The page of a run, which a notebook displays.

  Attributes:
    html: The page.
  """

  html: str

  def __repr__(self) -> str:
    """A line where no page can be shown, and not the whole page again."""
    return f'a page of {len(self.html):,} characters'

  def _repr_html_(self) -> str:
    """The page in a frame, so that neither changes the style of the other."""
    page = html_lib.escape(self.html)
    return (
      f'<iframe sandbox srcdoc="{page}" width="100%" height="800" '
      'style="border: 1px solid #ddd"></iframe>'
    )


def page(workdir: str | os.PathLike[str], allow: Iterable[str] = ()) -> RunPage:
  """The page of a run, for a notebook; nothing is written.

  Args:
    workdir: The run's folder.
    allow: Modules whose classes may be imported where the folder names them.

  Raises:
    ValueError: The folder holds no run, or is damaged.
  """
  run = run_sections.read(workdir_lib.folder_of(workdir), allow)
  return RunPage(html(run, allow, linked=False))


def write(
  workdir: str | os.PathLike[str], allow: Iterable[str] = ()
) -> list[pathlib.Path]:
  """Writes a run's page and pictures into its folder; gives their paths.

  Arguments and errors are those of `page`; beyond them it raises OSError where
  a file cannot be written.
  """
  folder = workdir_lib.folder_of(workdir)
  run = run_sections.read(folder, allow)
  run_commands.write_config(folder)
  figures = []
  if run_sections.curves(run):
    units = run.facts.loss_unit, run.facts.counted
    figures.append((CURVES, plots.curves_figure(run.rows, *units)))
  if _has_load(run):
    figures.append((LOAD, plots.load_figure(run.rows)))
  for name, figure in figures:
    _write(folder / name, plot_style.picture(figure))
  _write(folder / PAGE, html(run, allow).encode())
  return [folder / name for name in [PAGE, *(name for name, _ in figures)]]


def html(
  run: RunFolder, allow: Iterable[str] = (), *, linked: bool = True
) -> str:
  """The page of a run.

  Args:
    run: The content of the run's folder.
    allow: Modules whose classes may be imported where the folder names them.
    linked: Whether other files of the folder are linked.
  """
  options, problem = _options(run, allow)
  tables, warnings = run_sections.routing(run.folder)
  name = run_commands.name_of(run.folder)
  return html_pages.render(
    _TEMPLATE,
    title=run.folder.resolve().name,
    run=run,
    name=name,
    state=run_sections.state(run),
    headline=run_sections.headline(run),
    charts=[
      (panel.title, _svg(plots.panel_figure(panel)))
      for panel in run_sections.curves(run)
    ],
    evaluations=run_sections.evaluations(run.rows),
    load=_svg(plots.load_figure(run.rows, _LOAD_WIDTH))
    if _has_load(run)
    else '',
    how_to_read=plot_style.HOW_TO_READ,
    routing=tables,
    warnings=warnings,
    trace_pages=run_files.trace_pages(run.folder),
    sample=run_sections.sample(run.folder),
    options=options,
    problem=problem,
    config=json.dumps(run.config, indent=2, ensure_ascii=False),
    environment=run_sections.environment(run.facts),
    files=run_files.files(run.folder),
    commands=run_commands.commands(
      run.folder, run.facts, run.config, ended=run.ended
    ),
    linked=linked,
    now=run_facts.now(),
  )


def _options(
  run: RunFolder, allow: Iterable[str]
) -> tuple[list[run_sections.OptionLine], str]:
  """The options that differ from the defaults, or why they are not known."""
  try:
    return run_sections.changed_options(run.config, allow), ''
  except Exception as error:  # a user's own class may raise anything
    return [], str(error) or type(error).__name__


def _has_load(run: RunFolder) -> bool:
  return any(
    key.startswith('train/layer_') and key.endswith('/load')
    for row in run.rows
    for key in row
  )


def _svg(figure: Any) -> str:
  return html_pages.data_uri(plot_style.picture(figure, 'svg'), 'svg')


def _write(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that at any moment it is the old or the new one."""
  unfinished = path.with_name(path.name + '.tmp')
  unfinished.write_bytes(content)
  unfinished.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  parser = command_line.Parser(
    prog='python -m moe_jax.analysis.run_page',
    description='Writes index.html and its pictures into the folder of a run.',
    allow_abbrev=False,
  )
  parser.add_argument('workdir', metavar='WORKDIR', help='folder of the run')
  text = "module from which the run's own classes may be imported; repeatable"
  parser.add_argument('--allow_module', action='append', default=[], help=text)
  parser.add_argument('--traceback', action='store_true')
  options = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)
  with command_line.reported(options.traceback):
    page_path, *picture_paths = write(options.workdir, options.allow_module)
    print(f'The page is {page_path}', *picture_paths, sep='\n')


if __name__ == '__main__':
  main()

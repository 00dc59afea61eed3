"""Writes all studies' results on one page, as Markdown.

    python -m experiments.report

Copies `results/<study>/full/summary.json` of every study that has one, with its
figure, to `experiments/results`, and writes `experiments/RESULTS.md` from all
summaries there; a study that was not run again keeps its earlier summary.
Claims are judged as the study has them today, and figures drawn. The page
refuses to mix corpora: studies of one task must have seen the same bytes.
"""

import importlib
import importlib.util
import json
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from experiments.study import figures, stored, verdicts
from experiments.study import results as study_results
from experiments.study.study import Study
from experiments.study.tables import markdown_table
from moe_jax import cli
from moe_jax.errors import InputError

HERE = pathlib.Path(__file__).parent
KEPT = 'results'
PAGE = 'RESULTS.md'
MISSES = 'misses.md'
BENCHMARKS = 'benchmarks'
PRESET = 'full'
_ABOUT = """\
These are published tables that were run again at a size that two cores can
train; `python -m experiments.report` makes this page from the result of each
study's full preset. Models here are thousands of times smaller
than the papers', so it is directions that are compared, never values. A
direction counts as reproduced only where the paired 95 % interval of the
difference excludes zero on the paper's side; else it is "opposite" or "not
resolved", with the smallest difference that the seeds could have resolved
beside it. A claim that two rows are alike counts where the whole interval lies
within its bound. Questions of our own, which no paper has a number for, are
"shown" or "refuted". Each interval is that of a single comparison: of twenty
pairs of rows that do not differ, one would be resolved by chance. Values marked
as those of a secondary source were not read in the paper, and unverified ones
are not shown. A verdict is withheld, with the reason, where fewer than three
seeds were run or a run was a trial, and where the study has revised a row or a
column since its result was stored: such cells have a †. It is also withheld
where a baseline is not served as its paper has it. Each study stands with the
command that made it, and with its device and date: the code has changed since.
"""


def summaries_of(results: pathlib.Path) -> dict[str, pathlib.Path]:
  """Paths of the summaries of full presets, by study."""
  paths = sorted(results.glob(f'*/{PRESET}/{study_results.SUMMARY}'))
  return {path.parts[-3]: path for path in paths}


def collect(results: pathlib.Path, archive: pathlib.Path) -> None:
  """Copies reported summaries, figures and benchmarks to the archive."""
  archive.mkdir(parents=True, exist_ok=True)
  for name, path in summaries_of(results).items():
    picture = path.with_name(study_results.PICTURE)
    shutil.copyfile(path, archive / f'{name}.json')
    shutil.copyfile(picture, archive / f'{name}.png')
  for path in sorted(results.glob('bench_*/*/results.json')):
    (archive / BENCHMARKS).mkdir(exist_ok=True)
    name = '-'.join(path.parts[-3:-1])  # the benchmark and the device
    shutil.copyfile(path, archive / BENCHMARKS / f'{name}.json')


def read(
  archive: pathlib.Path, results: pathlib.Path | None = None
) -> list[dict[str, Any]]:
  """Reads the summaries of all studies, in the order of their names.

  Args:
    archive: Folder of the summaries that were copied before.
    results: Folder of new results, which replace those copied before.

  Raises:
    ValueError: There is no summary, or two studies of one task saw different
      data.
  """
  paths = {path.stem: path for path in archive.glob('*.json')}
  paths |= summaries_of(results) if results else {}
  texts = misses(archive)
  summaries = [
    today(json.loads(path.read_text(encoding='utf-8')))
    | {'misses': texts.get(name, '')}
    for name, path in sorted(paths.items())
  ]
  if not summaries:
    where = ' or '.join(str(f) for f in (results, archive) if f)
    raise InputError(f'no results of a study with --preset={PRESET} in {where}')
  names: dict[str, dict[str, list[str]]] = {}
  for summary in summaries:
    same = names.setdefault(summary['task'], {})
    same.setdefault(', '.join(summary['digests']), []).append(summary['name'])
  for task, by_digests in names.items():
    if len(by_digests) > 1:
      raise InputError(f'studies of {task!r} saw different data: {by_digests}')
  return summaries


def misses(archive: pathlib.Path) -> dict[str, str]:
  """Texts on opposite, refuted and open claims of stored results, by study.

  They are the sections of the archive's file `misses.md`, if it has one.
  """
  if not (path := archive / MISSES).exists():
    return {}
  _, *sections = re.split(r'^## (\w+)$', path.read_text('utf-8'), flags=re.M)
  texts = (' '.join(text.split()) for text in sections[1::2])
  return dict(zip(sections[::2], texts, strict=True))


def find_study(name: str) -> Study | None:
  """The study of a stored summary; None where it no longer exists."""
  module = f'experiments.{name}'
  if importlib.util.find_spec(module) is None:
    return None
  return importlib.import_module(module).STUDY


def pending(summaries: Sequence[dict[str, Any]]) -> str:
  """A sentence that names the studies without a summary; '' if all have one."""
  stored_names = {summary['name'] for summary in summaries}
  names = [
    path.stem
    for path in sorted(HERE.glob('*.py'))
    if '\nSTUDY = ' in path.read_text(encoding='utf-8')
    and path.stem not in stored_names
  ]
  if not names:
    return ''
  listed = ', '.join(f'`{name}`' for name in names)
  return f'No result of a full preset is stored yet of {listed}.\n'


def today(summary: dict[str, Any]) -> dict[str, Any]:
  """A summary as its study judges it today; see `stored.judged_again`."""
  study = find_study(summary['name'])
  return summary if study is None else stored.judged_again(summary, study)


def redraw(summaries: Sequence[dict[str, Any]], archive: pathlib.Path) -> None:
  """Draws the figures anew."""
  for summary in summaries:
    if study := find_study(summary['name']):
      figures.draw(study.figure, summary, archive / f'{summary["name"]}.png')


def page(summaries: Sequence[dict[str, Any]]) -> str:
  """The page of all studies, in Markdown."""
  overview = []
  for summary in summaries:
    words = [claim['verdict'] for claim in summary['claims']]
    row = {'study': f'[{summary["name"]}](#{_anchor(summary["title"])})'}
    for word in verdicts.WORDS:
      row[word] = str(words.count(word))
    overview.append({**row, 'core minutes': f'{summary["minutes"]:g}'})
  texts = [
    study_results.text_of(summary, f'{KEPT}/{summary["name"]}.png')
    for summary in summaries
  ]
  head = [f'# Results\n\n{_ABOUT}', markdown_table(overview)]
  return '\n'.join(filter(None, [*head, pending(summaries), *texts]))


def _anchor(title: str) -> str:
  """The anchor that GitHub makes of a heading."""
  characters = ''.join(c for c in title.lower() if c.isalnum() or c in ' -')
  return characters.replace(' ', '-')


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Collects the summaries and writes the page."""
  parser = cli.parser('experiments.report', __doc__)
  add = parser.add_argument
  add('--results', default='results', help='folder to which studies wrote')
  add('--output', default=str(HERE), help='folder of the page')
  options = parser.parse_args(argv)
  output, results = pathlib.Path(options.output), pathlib.Path(options.results)
  summaries = read(output / KEPT, results)
  collect(results, output / KEPT)
  redraw(summaries, output / KEPT)
  (output / PAGE).write_text(page(summaries), encoding='utf-8')
  print(f'written: {output / PAGE}')


if __name__ == '__main__':
  main()

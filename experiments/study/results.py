"""Turns a study's numbers into a summary, a text, a figure and files."""

import csv
import json
import pathlib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.study import figures, stored, verdicts
from experiments.study import rates as rates_lib
from experiments.study import times as times_lib
from experiments.study.parts import Figure, Preset, Results, Revision, Row
from experiments.study.study import Study
from experiments.study.tables import bounds_of, markdown_table
from experiments.study.tasks import Task
from experiments.study.times import StepTime
from moe_jax.analysis.intervals import Bounds, Interval
from moe_jax.runs.workdir import write_text

SUMMARY, PICTURE, TABLE = 'summary.json', 'figure.png', 'table.md'
OLDER = '†'  # the mark of cells that are older than the study
DOUBTFUL = '‡'  # of claims that fall at 5 % of false discoveries


def summary_of(
  study: Study,
  preset: Preset,
  task: Task,
  rows: Sequence[Row],
  results: Results,
  times: Mapping[str, StepTime],
  arguments: Sequence[str] = (),
  configs: Mapping[str, str] = types.MappingProxyType({}),
  rates: Mapping[str, float] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """The summary of a study, as JSON can hold it; `report` reads it.

  Args:
    study: The study.
    preset: The preset that was run; see `verdicts.judged`.
    task: The task that was run; see `verdicts.judged`.
    rows: Rows of the table.
    results: Results of all runs, by arm.
    times: Ratios of step times to those of a group's first arm, by arm.
    arguments: Arguments of the command that reproduces the table.
    configs: Digests of the configs, see `Study.digests`.
    rates: The learning rates of arms, where the study searches them.
  """
  runs = [run for arm in results.values() for run in arm]
  made, remarks = [run['made'] for run in runs], study.remarks
  code = sorted({m['code'] for m in made if 'code' in m})
  return {
    'name': study.name,
    **verdicts.judged(study, preset, task, rows),
    'task': task.label,
    'steps': preset.steps,
    'length': study.length(preset),
    'seeds': list(range(preset.seeds)),
    'overrides': dict(preset.overrides),
    'arguments': list(arguments),
    'digests': sorted({run['data_digest'] for run in runs}),
    'device': _all({f'{m["device"]}, {m["cores"]} cores' for m in made}),
    'date': _all({m['date'][:10] for m in made}),
    'jax': _all({m['jax'] for m in made}),
    'minutes': round(sum(m['minutes'] for m in made), 1),
    'code': code,
    'earlier': [*study.earlier],
    'dropped': study.dropped,
    'exempt': study.exempt,
    'searched': bool(study.rates or study.explorations),
    'rates': rates_lib.described(rates, study.rates) if study.rates else '',
    'times': {name: f'{t.spread:.2f}' for name, t in times.items()},
    'timing': times_lib.describe(times) if times else '',
    'configs': dict(configs),
    'columns': [*map(verdicts.described_column, study.columns)],
    'remarks': remarks if isinstance(remarks, str) else remarks(results),
  }


def _all(names: Collection[str]) -> str:
  return ' and '.join(sorted(names))


def text_of(summary: Mapping[str, Any], picture: str = PICTURE) -> str:
  """The page of a study, in Markdown.

  Args:
    summary: Summary of the study.
    picture: Path of the figure, relative to the page.
  """
  title, times = summary['title'], summary['times']
  after = []
  if times:
    listed = '; '.join(f'{name} {time}' for name, time in times.items())
    sentence = f'Step times, medians and quartiles: {listed}.'
    after.append(f'{sentence} {summary.get("timing", "")}'.rstrip())
  remarks = filter(None, (summary['remarks'], summary.get('misses')))
  claims = [c for c in summary['claims'] if c['kind'] != verdicts.CHECK]
  paragraphs = [
    f'# {title}',
    f'{summary["source"]}. `{command(summary)}`: {_conditions(summary)}',
    *summary.get('marks', []),
    *(_aged(summary, revision) for revision in summary.get('outdated', [])),
    *(_gate(summary, gate) for gate in summary['gates']),
    _added(summary),
    _rates(summary),
    results_table(summary),
    claims_table(summary, claims),
    *filter(None, (*after, ' '.join(remarks))),
    *summary['earlier'],
    checks_text(summary),
    f'![{title}]({picture})',
  ]
  return '\n\n'.join(filter(None, paragraphs)) + '\n'


def _rates(summary: Mapping[str, Any]) -> str:
  """A sentence on the arms' learning rates."""
  if summary['searched']:
    return summary.get('rates', '')
  if summary['exempt']:
    return f'No learning rate was searched, as {summary["exempt"]}.'
  return (
    'No learning rate was searched for each arm: a difference between arms may '
    'be one of the rate that they share.'
  )


def _added(summary: Mapping[str, Any]) -> str:
  """A sentence on seeds that were added when others had been seen, or ''."""
  seen = summary.get('seeds_seen', 0)
  if not seen:
    return ''
  return (
    f'The results of seeds 0 to {seen - 1} were known when others were added, '
    f'so that seeds from {seen} on alone judge the claims. The table and the '
    'figure show all seeds.'
  )


def _gate(summary: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
  """A sentence on what the study presupposes, and whether it was seen."""
  is_open = gate['verdict'] == verdicts.SHOWN
  word = 'seen' if is_open else f'{gate["verdict"]}, so claims are withheld'
  return f'Gate: {gate["text"]}. {_here(summary, gate)}: **{word}**.'


def command(summary: Mapping[str, Any]) -> str:
  """The command that reproduces the study."""
  arguments = stored.arguments_of(summary)
  return ' '.join([f'python -m experiments.{summary["name"]}', *arguments])


def _conditions(summary: Mapping[str, Any]) -> str:
  """The data, length, device and date of the runs as Markdown."""
  seeds, date = summary['seeds'], summary.get('written')
  overrides = ''.join(f', `{k}={v}`' for k, v in summary['overrides'].items())
  length = summary.get('length', f'{summary["steps"]:,} steps')
  written = ''
  if date and date <= summary['date'][:10]:
    written = f' Claims were written on {date}, before these runs.'
  return (
    f'{summary["task"]} (sha256 '
    f'{", ".join(digest[:12] for digest in summary["digests"])}), '
    f'{length}, paired seeds {seeds[0]} to {seeds[-1]}'
    f'{overrides}; {summary["device"]}, {summary["date"]}, jax '
    f'{summary["jax"]}; {summary["minutes"]:g} minutes of runs on one core. '
    f'± is a 95 % confidence interval over seeds (Student).{written}'
  )


def _aged(summary: Mapping[str, Any], revision: Mapping[str, Any]) -> str:
  """A paragraph on a revision of the study since its result was stored.

  Cells that the revision concerns have the mark `OLDER` in the table.
  """
  date_text = f' of {revision["date"]}' if revision['date'] else ''
  return (
    f'{OLDER} These results are older than the study{date_text}: '
    f'{revision["what"]} Verdicts that rest on them are withheld until '
    f'`{command(summary)}` has run again, about '
    f'{summary["minutes"] / 2:.0f} minutes on two cores.'
  )


def results_table(summary: Mapping[str, Any]) -> str:
  """The table of the study's numbers; cells older than it have a mark."""
  revisions = [Revision(**values) for values in summary.get('outdated', [])]
  lines = []
  for row in summary['rows']:
    line = {'': row['name']}
    for column in summary['columns']:
      values = row['values'].get(column['name'], [])
      cell = _cell(values, column['digits'], bounds_of(row, column))
      is_old = any(r.concerns(row['name'], column['name']) for r in revisions)
      line[figures.heading(column)] = cell + f' {OLDER}' * bool(is_old and cell)
    lines.append(line)
  return markdown_table(lines)


def _cell(values: Sequence[float], digits: int, bounds: Bounds) -> str:
  """A mean with its interval; both of its ends where it would pass a bound."""
  if not values or None in values:
    return ''
  if len(values) > 1 and len(set(values)) == 1:  # measured once for all seeds
    return f'{values[0]:z.{digits}f}'
  return Interval.of(values).text(f'z.{digits}f', bounds)


def _here(summary: Mapping[str, Any], claim: Mapping[str, Any]) -> str:
  """The rows that a claim compares, their difference, and the claimed side."""
  digits = {c['name']: c['digits'] for c in summary['columns']}
  spec = f'z.{digits.get(claim["column"], 2)}f'
  mean, width = claim['difference'], claim['half_width']
  measured = 'not measured'
  if mean is not None:
    measured = f'{Interval(mean, np.inf if width is None else width):+{spec}}'
  than, within = claim['than'], claim.get('within', 0.0)
  than = than if isinstance(than, str) else f'{than:g}'
  sides = {'lower': 'claimed below 0', 'higher': 'claimed above 0'}
  side = sides.get(claim['direction'], f'equal if within {within:g}')
  return f'{claim["column"]}, {claim["row"]} minus {than}: {measured}; {side}'


def claims_table(
  summary: Mapping[str, Any], claims: Sequence[Mapping[str, Any]]
) -> str:
  """The table of claims: published numbers, ours, verdicts; '' for no claim."""
  lines = []
  for claim in claims:
    verdict = f'**{claim["verdict"]}**' + f' {DOUBTFUL}' * claim['doubtful']
    lines.append(
      {
        'claim': '. '.join(filter(None, (claim['text'], claim['note']))),
        'paper': ' against '.join(claim['published']),
        'here': _here(summary, claim),
        'verdict': ': '.join(filter(None, (verdict, claim.get('reason')))),
      }
    )
  return markdown_table(lines) if lines else ''


def checks_text(summary: Mapping[str, Any]) -> str:
  """A small paragraph on the claims that could not have failed; '' for none."""
  checks = [c for c in summary['claims'] if c['kind'] == verdicts.CHECK]
  if not checks:
    return ''
  texts = []
  for c in checks:
    verdict = ': '.join(filter(None, (c['verdict'], c.get('reason'))))
    texts.append(f'{c["text"]} ({_here(summary, c)}; {verdict}). {c["check"]}')
  return f'<sub>Checks, which are counted nowhere: {" ".join(texts)}</sub>'


def write(
  folder: pathlib.Path,
  figure: Figure,
  summary: Mapping[str, Any],
  configs: Mapping[str, ConfigDict],
) -> str:
  """Writes table, rows, figure, summary and configs.

  Args:
    folder: Folder of the files.
    figure: Description of the figure.
    summary: Summary of the study.
    configs: Configs of the arms, by name of the arm.

  Returns:
    The text of the table.
  """
  (folder / 'configs').mkdir(parents=True, exist_ok=True)
  text = text_of(summary)
  (folder / TABLE).write_text(text, encoding='utf-8')
  for i, (name, config) in enumerate(configs.items()):
    path = folder / 'configs' / f'{i:02d}.json'
    entry = {'arm': name, 'config': config.to_dict()}
    path.write_text(json.dumps(entry, indent=2, default=list) + '\n')
  with (folder / 'rows.csv').open('w', newline='', encoding='utf-8') as file:
    writer = csv.writer(file)
    writer.writerow(['row', 'column', 'unit', 'seed', 'value'])
    for row in summary['rows']:
      for column in summary['columns']:
        head = row['name'], column['name'], column['unit']
        values = row['values'].get(column['name'], [])
        for seed, value in zip(summary['seeds'], values, strict=False):
          writer.writerow([*head, seed, value])
  figures.draw(figure, summary, folder / PICTURE)
  # The summary is written last and atomically: wherever `report` finds one, it
  # expects the figure too.
  write_text(folder / SUMMARY, json.dumps(summary, indent=1) + '\n')
  return text

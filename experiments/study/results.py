"""Turns a study's numbers into a summary, a text, a figure and files."""

import csv
import json
import pathlib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections

from experiments.study import figures, judging, result_tables, stored
from experiments.study import times as times_lib
from experiments.study.parts import Figure, Preset, Results, Row
from experiments.study.result_tables import OLDER
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.times import StepTime
from moe_jax.runs.workdir import write_text

SUMMARY, PICTURE, TABLE = 'summary.json', 'figure.png', 'table.md'


def summary_of(
  study: Study,
  preset: Preset,
  task: Task,
  rows: Sequence[Row],
  results: Results,
  times: Mapping[str, StepTime],
  arguments: Sequence[str] = (),
  configs: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """The summary of a study, as JSON can hold it; `report` reads it.

  Args:
    study: The study.
    preset: The preset that was run. Where it leaves out arms, claims about
      rows that need them are left out.
    task: The task that was run. Where it is not comparable, the claims are
      without published numbers.
    rows: Rows of the table.
    results: Results of all runs, by arm.
    times: Ratios of step times to those of a group's first arm, by arm.
    arguments: Arguments of the command that reproduces the table.
    configs: Digests of the configs, see `Study.digests`.
  """
  runs = [run for arm in results.values() for run in arm]
  facts, remarks = _facts([run['made'] for run in runs]), study.remarks
  return {
    'name': study.name,
    'title': study.title,
    'source': study.source,
    'task': task.label,
    'steps': preset.steps,
    'length': study.length(preset),
    'seeds': list(range(preset.seeds)),
    'overrides': dict(preset.overrides),
    'arguments': list(arguments),
    'digests': sorted({run['data_digest'] for run in runs}),
    **facts,
    'marks': stored.older_code(facts['code']),
    'times': {name: f'{t.spread:.2f}' for name, t in times.items()},
    'timing': times_lib.describe(times) if times else '',
    'configs': dict(configs),
    'columns': [*map(judging.described_column, study.columns)],
    'rows': [judging.described_row(row) for row in rows],
    'claims': judging.judged(study, preset, task, rows),
    'written': study.written,
    'remarks': remarks if isinstance(remarks, str) else remarks(results),
  }


def _facts(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Device, date, jax version and code of runs, and their minutes in total."""
  return {
    'device': _all({f'{m["device"]}, {m["cores"]} cores' for m in provenances}),
    'date': _all({m['date'][:10] for m in provenances}),
    'jax': _all({m['jax'] for m in provenances}),
    'minutes': round(sum(m['minutes'] for m in provenances), 1),
    'code': sorted({m['code'] for m in provenances if 'code' in m}),
  }


def _all(names: Collection[str]) -> str:
  return ' and '.join(sorted(names))


def text_of(summary: Mapping[str, Any], picture: str = PICTURE) -> str:
  """The study's section of a page, in Markdown.

  Args:
    summary: Summary of the study.
    picture: Path of the figure, relative to the page.
  """
  lines = [
    f'## {summary["title"]}',
    '',
    f'{summary["source"]}. `{command(summary)}`: {conditions(summary)}',
    '',
    *aged(summary),
    result_tables.results_table(summary),
    '',
    result_tables.claims_table(summary),
  ]
  for paragraph in caveats(summary):
    lines += ['', paragraph]
  lines += ['', f'![{summary["title"]}]({picture})', '']
  return '\n'.join(lines)


def conditions(summary: Mapping[str, Any]) -> str:
  """The data, length, device and date of the runs as Markdown."""
  seeds = summary['seeds']
  overrides = ''.join(f', `{k}={v}`' for k, v in summary['overrides'].items())
  length = summary.get('length', f'{summary["steps"]:,} steps')
  return (
    f'{summary["task"]} (sha256 '
    f'{", ".join(digest[:12] for digest in summary["digests"])}), '
    f'{length}, paired seeds {seeds[0]} to {seeds[-1]}'
    f'{overrides}; {summary["device"]}, {summary["date"]}, jax '
    f'{summary["jax"]}; {summary["minutes"]:g} minutes of runs on one core. '
    f'± is a 95 % confidence interval over seeds (Student).{_written(summary)}'
  )


def caveats(summary: Mapping[str, Any]) -> list[str]:
  """The step times and the remarks, a paragraph each, in Markdown."""
  paragraphs = []
  if summary['times']:
    times = [
      f'{name} {step_time}' for name, step_time in summary['times'].items()
    ]
    listed = f'Step times, medians and quartiles: {"; ".join(times)}.'
    paragraphs.append(f'{listed} {summary.get("timing", "")}'.rstrip())
  remarks = ' '.join(filter(None, (summary['remarks'], summary.get('misses'))))
  return paragraphs + [remarks] * bool(remarks)


def command(summary: Mapping[str, Any]) -> str:
  """The command that reproduces the study."""
  arguments = stored.arguments_of(summary)
  return ' '.join([f'python -m experiments.{summary["name"]}', *arguments])


def _written(summary: Mapping[str, Any]) -> str:
  """A sentence on when the claims were written, or ''."""
  date = summary.get('written')
  if not date or date > summary['date'][:10]:
    return ''
  return f' Claims were written on {date}, before these runs.'


def aged(summary: Mapping[str, Any]) -> list[str]:
  """Paragraphs on what a stored result is older than, each with a blank line.

  Cells that are concerned have the mark `OLDER` in the table.
  """
  paragraphs = list(summary.get('marks', []))
  for revision in summary.get('outdated', []):
    date_text = f' of {revision["date"]}' if revision['date'] else ''
    paragraphs.append(
      f'{OLDER} These results are older than the study{date_text}: '
      f'{revision["what"]} Verdicts that rest on them are withheld until '
      f'`{command(summary)}` has run again, about '
      f'{summary["minutes"] / 2:.0f} minutes on two cores.'
    )
  return [line for paragraph in paragraphs for line in (paragraph, '')]


def write(
  folder: pathlib.Path,
  figure: Figure,
  summary: Mapping[str, Any],
  configs: Mapping[str, ml_collections.ConfigDict],
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
  _write_csv(folder / 'rows.csv', summary)
  figures.draw(figure, summary, folder / PICTURE)
  # The summary is written last and atomically: wherever `report` finds one, it
  # expects the figure too.
  write_text(folder / SUMMARY, json.dumps(summary, indent=1) + '\n')
  return text


def _write_csv(path: pathlib.Path, summary: Mapping[str, Any]) -> None:
  """Writes the table's numbers, with a line for each of every seed."""
  with path.open('w', newline='', encoding='utf-8') as file:
    writer = csv.writer(file)
    writer.writerow(['row', 'column', 'unit', 'seed', 'value'])
    for row in summary['rows']:
      for column in summary['columns']:
        values = row['values'].get(column['name'], [])
        for seed, value in zip(summary['seeds'], values, strict=False):
          writer.writerow(
            [row['name'], column['name'], column['unit'], seed, value]
          )

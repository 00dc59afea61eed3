"""The content of a run's page, read from the run's folder.

Not here: how it is shown (`run_page.py`), commands
(`run_commands.py`), and the list of files (`run_files.py`).
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax import plugins, sections
from moe_jax.analysis import plots, routing_report, run_facts
from moe_jax.analysis.run_facts import RunFacts
from moe_jax.analysis.run_files import REPORT, SAMPLE
from moe_jax.analysis.text_tables import ValueTable
from moe_jax.errors import InputError
from moe_jax.run_config import RunConfig
from moe_jax.runs import metrics, nonfinite, trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import CheckpointError

Rows = list[dict[str, Any]]
_MAX_LETTERS = 20_000  # letters of a sample that are shown


class NamedValue(NamedTuple):
  """A value with its name, both as text."""

  name: str
  value: str


class OptionLine(NamedTuple):
  """A key of a config as text: value, default, and what it means."""

  key: str
  value: str
  default: str
  sentence: str


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """The values that are read from the folder of a run.

  Attributes:
    folder: The folder.
    rows: The rows of its metrics.
    config: Its config; {} where it cannot be read.
    facts: Further facts of the run.
  """

  folder: pathlib.Path
  rows: Rows
  config: Mapping[str, Any]
  facts: RunFacts

  @property
  def step(self) -> int:
    """The last step that has a row; 0 if none has."""
    return max((row['step'] for row in self.rows), default=0)

  @property
  def total(self) -> int | None:
    """The number of steps of the whole run, if it is known."""
    total = self.config.get('total_steps')
    return total if type(total) is int else None

  @property
  def ended(self) -> bool:
    """Whether no step is left, as its state or its rows say."""
    if self.facts.state:
      return self.facts.state == run_facts.FINISHED
    return self.step == self.total


def read(folder: pathlib.Path, allow: Iterable[str] = ()) -> RunFolder:
  """Reads a run's folder.

  Args:
    folder: The folder.
    allow: Modules whose classes may be imported where the folder names them.

  Raises:
    ValueError: It holds no run, or its config or metrics are damaged.
  """
  if not (folder / workdir_lib.CONFIG).exists():
    raise InputError(f'{folder} holds no run: it has no {workdir_lib.CONFIG}')
  path = folder / metrics.FILE_NAME
  rows = metrics.read_metrics(path) if path.exists() else []
  config = workdir_lib.kept_config(folder)
  return RunFolder(folder, rows, config, run_facts.read(folder, allow))


def state(run: RunFolder) -> str:
  """A sentence on how far the run is."""
  progress, total = f'step {run.step:,}', run.total
  if total is not None:
    progress += f' of {total:,}'
  match run.facts.state:
    case run_facts.FINISHED if total is not None and run.step < total:
      sentence = f'Ended early at {progress}.'
    case run_facts.FINISHED:
      sentence = f'Finished at {progress}.'
    case run_facts.STOPPED:
      sentence = f'Stopped; logged until {progress}. It can go on.'
    case run_facts.FAILED:
      sentence = f'Failed; logged until {progress}.'
    case run_facts.RUNNING:
      sentence = f'In training: {progress} when this page was written.'
    case _ if not run.rows:
      sentence = 'Not trained here yet.'
    case _:
      sentence = f'{"Finished" if run.ended else "Not finished"}: {progress}.'
  if skipped := sorted(nonfinite.steps(run.folder)):
    steps = ', '.join(f'{step:,}' for step in skipped[:5])
    more = ', …' * (len(skipped) > 5)
    sentence += (
      f' Loss, gradient or state of {len(skipped)} '
      f'step{"s" * (len(skipped) > 1)} was not finite: {steps}{more}.'
    )
  return sentence


def headline(run: RunFolder) -> list[NamedValue]:
  """The numbers at the top of the page."""
  facts, unit = run.facts, run.facts.loss_unit
  pairs = [
    ('config', facts.config_name),
    ('model', facts.model.replace('_', ' ')),
    ('experts', facts.experts or 'none' * facts.has_blocks),
    ('parameters', f'{facts.parameters:,}' if facts.parameters else ''),
    ('active per token', f'{facts.active:,}' if facts.is_sparse else ''),
    ('last training loss', _last(run.rows, 'train/loss', f'.4f {unit}')),
    ('dropped choices', _last(run.rows, 'train/drop_rate', '.1%')),
    ('median speed', _speed(run)),
    ('best checkpoint', _best(run.folder)),
  ]
  return [NamedValue(name, value) for name, value in pairs if value]


def environment(facts: RunFacts) -> list[NamedValue]:
  """Devices, versions and times."""
  pairs = [('devices', facts.devices), ('last start', facts.started)]
  return [
    NamedValue(*pair) for pair in [*pairs, *facts.versions.items()] if pair[1]
  ]


def evaluations(rows: Rows) -> ValueTable | None:
  """The table of evaluations; None where there was none."""
  values: dict[tuple[str, str], list[tuple[float, int]]] = {}
  for row in rows:
    for key, value in row.items():
      match = re.fullmatch(r'eval/([^/]+)/((?!layer_\d+/).+)', key)
      if match and isinstance(value, int | float):
        values.setdefault((match[1], match[2]), []).append((value, row['step']))
  cells = []
  for (name, measure), pairs in values.items():
    valid = [pair for pair in pairs if math.isfinite(pair[0])]
    ends = [min(valid), max(valid, key=lambda p: p[0])] if valid else [None] * 2
    cells.append([name, measure, *map(_value_at_step, [pairs[-1], *ends])])
  if not cells:
    return None
  columns = dict.fromkeys(['evaluation', 'measure'], '')
  columns |= dict.fromkeys(
    ['last (step)', 'lowest (step)', 'highest (step)'], '>'
  )
  note = 'Losses are better the lower they are; most other measures the higher.'
  return ValueTable('evaluations', 'Evaluations', note, columns, cells)


def routing(folder: pathlib.Path) -> tuple[list[ValueTable], list[str]]:
  """Tables of the routing report, and its warnings; both may be empty."""
  try:
    table = json.loads((folder / REPORT).read_text(encoding='utf-8'))
    warnings = sorted(
      {str(row['warning']) for row in table if 'warning' in row}
    )
    return routing_report.tables(table), warnings
  except (OSError, AttributeError, KeyError, TypeError, ValueError):
    return [], []


def sample(folder: pathlib.Path) -> str:
  """The text that the model wrote; '' where it wrote none."""
  try:
    text = (folder / SAMPLE).read_text(encoding='utf-8', errors='replace')
  except OSError:
    return ''
  return text if len(text) <= _MAX_LETTERS else text[:_MAX_LETTERS] + '…'


def changed_options(
  config: Mapping[str, Any], allow: Iterable[str] = ()
) -> list[OptionLine]:
  """The keys of a config that differ from the defaults.

  Raises:
    ValueError: The config names a class of a module that is not allowed, or is
      of another version.
  """
  plugins.check_allowed(plugins.names_in(config), allow)
  return [
    OptionLine(
      leaf.path,
      _value(leaf.value),
      'required'
      if leaf.default is dataclasses.MISSING
      else _value(leaf.default),
      leaf.spec.sentence,
    )
    for leaf in sections.leaves(RunConfig, config)
    if leaf.changed
  ]


def curves(run: RunFolder) -> list[plots.Panel]:
  """The panels of the run's curves; none before the first row."""
  try:
    return plots.panels(run.rows, run.facts.loss_unit, run.facts.counted)
  except InputError:
    return []


def _speed(run: RunFolder) -> str:
  speeds = sorted(_values(run.rows, 'train/tokens_per_second'))
  if not speeds:
    return ''
  return f'{speeds[len(speeds) // 2]:,.0f} {run.facts.counted}s/s'


def _last(rows: Rows, key: str, form: str) -> str:
  """The last value of a key, in a format with a unit behind it."""
  values = list(_values(rows, key))
  form, _, unit = form.partition(' ')
  return f'{values[-1]:{form}} {unit}'.rstrip() if values else ''


def _values(rows: Rows, key: str) -> Iterator[float]:
  return (row[key] for row in rows if isinstance(row.get(key), int | float))


def _best(folder: pathlib.Path) -> str:
  try:
    return f'step {trained.best_step(folder):,}'
  except (OSError, ValueError, CheckpointError):
    return ''


def _value_at_step(pair: Sequence[float] | None) -> str:
  if pair is None:
    return '-'
  value, step = pair
  text = f'{value:,}' if isinstance(value, int) else f'{value:.4f}'
  return f'{text} ({step:,})'


def _value(value: Any) -> str:
  return value if isinstance(value, str) and value else repr(value)

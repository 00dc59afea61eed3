"""Trains a config with several values and seeds, and compares them in pairs.

    python -m moe_jax.sweep --config=moe_jax:tiny_switch \
      --sweep model.moe.num_experts=4,8 --seeds=0,1,2 \
      --metric=all_tokens/loss --output=runs/sweep
    python -m moe_jax.sweep --config=moe_jax:tiny_switch \
      --sweep model.moe.num_experts=0,8 --sweep batch_size=16,32 \
      --metric=train/loss --config.total_steps=500

Each combination of swept values is an arm, and each arm is trained with every
seed: one run after another, `python -m moe_jax.main` with a workdir of its own.
The table has a row for each arm, with the mean over seeds of the metric's last
value, and the difference to the first arm, paired by seed, with its 95 %
confidence interval (Student's). A difference is "not resolved" where its
interval covers zero. The file `sweep.json` in the folder of --output has all
numbers. The same command again skips runs that are finished and goes on with
the others. Exit status: 0 if all runs are finished; 1 if one failed; 75 if
SIGTERM stopped the sweep; 130 after Ctrl-C.
"""

import argparse
import json
import math
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table

from moe_jax import cli
from moe_jax.analysis.intervals import Interval
from moe_jax.analysis.routing_report import wide_console
from moe_jax.config import unknown
from moe_jax.items import LOG, Item, add_sweep, check, last_message, swept
from moe_jax.runs import metrics, workdir

TABLE = 'sweep.json'
# Verdicts by the sign of a difference, 0 where its interval covers zero.
VERDICTS = {-1: 'lower', 0: 'not resolved', 1: 'higher'}


def last_value(item: Item, metric: str) -> float:
  """The last value of a metric in the rows of metrics that a run has written.

  Args:
    item: The run.
    metric: Name of the metric; 'eval/' at the beginning of the name of an
      evaluation's metric may be left out.

  Raises:
    ValueError: No row has a number of that name.
  """
  last: dict[str, float] = {}
  path = pathlib.Path(item.workdir) / metrics.FILE_NAME
  for row in metrics.read_metrics(path):
    last.update({k: v for k, v in row.items() if not isinstance(v, list)})
  for name in (metric, f'eval/{metric}'):
    if name in last:
      return last[name]
  # The message leaves out metrics of single layers, which are many.
  names = [name for name in last if name != 'step' and '/layer_' not in name]
  raise unknown('metric', metric, names)


def compare(arms: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
  """A row of the printed table for each arm, a combination of swept values.

  A row has 'arm', 'values' by seed and 'mean', and for an arm with a comparison
  'difference', 'half_width' and 'verdict', one of `VERDICTS`. JSON can hold the
  rows: None stands for NaN or infinity.

  Args:
    arms: Values of the metric by arm and seed. Each other arm is compared with
      the first, on the seeds that both have.
  """
  rows, base = [], next(iter(arms.values()))
  for name, values in arms.items():
    finite = {seed: _finite(value) for seed, value in values.items()}
    row: dict[str, Any] = {'arm': name, 'values': finite}
    if values:
      row['mean'] = _finite(sum(values.values()) / len(values))
    differences = [values[seed] - base[seed] for seed in values if seed in base]
    if values is not base and differences:
      interval = Interval.of(differences)
      row['difference'] = _finite(interval.mean)
      row['half_width'] = _finite(interval.half_width)
      row['verdict'] = VERDICTS[interval.sign()]
    rows.append(row)
  return rows


def _finite(value: float) -> float | None:
  return value if math.isfinite(value) else None


def table_of(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
  """The table to print, made of the rows that `compare` returns."""
  columns = ('seeds', metric, 'minus the first')
  table = Table('arm', *(Column(c, justify='right') for c in columns), '')
  for row in rows:
    cells = [row['arm'], str(len(row['values']))]
    for key, spec in ('mean', ',.4f'), ('difference', '+,.4f'):
      value = row.get(key)
      cells.append('' if value is None else f'{value:{spec}}')
    if cells[-1]:
      width = row['half_width']
      cells[-1] += ' ± ' + ('unknown' if width is None else f'{width:,.4f}')
    table.add_row(*cells, row.get('verdict', ''))
  return table


def _train(items: Sequence[Item], metric: str) -> bool:
  """Trains the runs that are not finished; returns whether none failed.

  Raises:
    SystemExit: SIGTERM or Ctrl-C stopped a run; when this function is called
      again with these items, the run goes on.
    ValueError: A run has no such metric.
  """
  failed = False
  for number, item in enumerate(items, 1):
    head, log = f'[{number}/{len(items)}]', pathlib.Path(item.workdir) / LOG
    if not item.is_finished():
      cli.print_line(f'{head} trains; see {log}')
      if _status_of(item, log):
        cli.complain(f'{item.workdir} failed: {last_message(log)}')
        failed = True
        continue
      item.note_finished()
    value = last_value(item, metric)
    cli.print_line(f'{head} {item.workdir}: {metric} {value:,.4f}')
  return not failed


def _status_of(item: Item, log: pathlib.Path) -> int:
  """Trains a run, whose output is appended to a log; returns its exit status.

  At SIGTERM or Ctrl-C the run saves and stops; a second signal kills it.

  Raises:
    SystemExit: SIGTERM or Ctrl-C came while the run was trained.
  """
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open('ab') as file:
    process = subprocess.Popen(
      [sys.executable, '-m', *item.words()],
      stdin=subprocess.DEVNULL,
      stdout=file,
      stderr=subprocess.STDOUT,
      start_new_session=True,  # Ctrl-C does not reach the run by itself
    )
  received: list[int] = []

  def stop(number, _):
    received.append(number)
    process.kill() if len(received) > 1 else process.terminate()

  caught = signal.SIGINT, signal.SIGTERM
  before = {number: signal.signal(number, stop) for number in caught}
  try:
    status = process.wait()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if received:
    cli.complain('stopped; the same command goes on')
    is_sigterm = received[0] == signal.SIGTERM
    sys.exit(cli.STOPPED if is_sigterm else cli.INTERRUPTED)
  return status


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = cli.parser('moe_jax.sweep', __doc__)
  cli.add_config(parser)
  add_sweep(parser)
  add = parser.add_argument
  add('--seeds', default='0,1,2', help='seeds that each arm is trained with')
  add(
    '--metric',
    required=True,
    help="metric that is compared, such as 'train/loss', or 'valid/loss' of an "
    "evaluation 'valid'",
  )
  add('--output', default='runs/sweep', help='folder of the workdirs')
  parser.set_defaults(run=_run)
  return cli.parse_command(parser, argv)


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
  """Trains the runs that are not finished, and prints and stores the table."""
  metric, output = options.metric, pathlib.Path(options.output)
  sweeps = [*options.sweep, ('seed', options.seeds)]
  items = swept(options.config, overrides, sweeps, options.output)
  known = ['train', *check(items)[0].evals]
  if metric.removeprefix('eval/').partition('/')[0] not in known:
    raise unknown('metric', metric, [f'{name}/...' for name in known])
  is_complete = _train(items, metric)
  arms: dict[str, dict[str, float]] = {}
  for item in items:
    name = pathlib.Path(item.workdir).name.rpartition('seed=')[0].rstrip(',')
    values = arms.setdefault(name or 'the config', {})
    if item.is_finished():
      values[item.overrides['seed']] = last_value(item, metric)
  rows = compare(arms)
  stored = {'config': options.config, 'overrides': overrides}
  text = json.dumps({**stored, 'metric': metric, 'arms': rows}, indent=2)
  workdir.write_text(output / TABLE, text + '\n')
  wide_console().print(table_of(rows, metric))
  cli.print_line(f'written: {output / TABLE}')
  return 0 if is_complete else 1


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  status = cli.run_command(*parse(argv))
  if status:
    sys.exit(status)


if __name__ == '__main__':
  main()

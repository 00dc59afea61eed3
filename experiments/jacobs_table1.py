"""Do experts that compete learn in half the epochs of back-propagation?

    python -m experiments.jacobs_table1

Jacobs et al. 1991 (https://doi.org/10.1162/neco.1991.3.1.79), Table 1: four
vowels from two formants, the first 50 of 75 speakers to train on. Mixtures of
4 and 8 experts reach a squared error of 0.08 in half the epochs of
back-propagation networks with 6 and 12 hidden units; all systems get 88 and
90 % of training and test cases right. Full-batch gradient descent without
momentum, the learning rate of each system chosen by a limited exploration.

Read from the paper: the criterion, the split, F1 and F2 in kHz, the equal
mixing proportions at the start, and that an expert is one logistic output. It
draws one decision line an expert, where its output is 0.5, and says that the
sizes give mixtures and networks roughly equal numbers of parameters: 24 and 48
against 25 and 49 with one output, 60 and 120 against 46 and 88 with four. Not
in the paper, and chosen: which class of a pair is 1 (here [I] and [A]), weights
that start uniform within 0.5, and the rates. `--targets=linear_pairs` leaves
out the logistic, `--targets=one_hot` has an output a class.

The paper's table has equation 1.3 alone; 1.1 and 1.2 are our own question. What
the choice of an expert says about a case, I(expert; case) in nats, is 0 of
gates that decide where one expert has all cases, and of gates that decide
nothing.

Found, 25 seeds each, a minute on two idle cores: 4 experts need about 0.6 of
the epochs of 6 hidden units with speakers that are drawn, and 0.72 on the table
of 1952 itself (835 against 1,159, by `--data=files:<path>`; not in RESULTS.md).
Two experts are in use, and 8 are a tenth slower than 4. Who is chosen says more
of a case where experts compete, 0.66 nats by 1.3 and 0.65 by 1.2, than where
they cooperate, 0.43 by 1.1. Equation 1.1 needs about as many epochs at its own
best rate, but its gates become the decision themselves where those of 1.2 and
1.3 leave it to the experts (`boundaries.png`). Equation 1.3 is hardly other
than half of 1.2: with one logistic output all distances are below 1, and the
exponential is nearly straight. One run in 25 of 1.2 had one expert alone, none
of 1.3.

`--targets=linear_pairs --max-epochs=20000` parts them: 4 experts of 1.3 have 3
in use, of 1.2 and 1.1 two, and need 3,400 epochs, 5,450 and 1,060 (6 hidden
units 8,600, two runs in 25 never). The likeliest expert of each case is right
in 87, 89 and 64 % of cases without the others: what cooperates does not
specialise. Who is chosen says 0.62, 0.64 and 0.27 nats of a case.
`--data=digits --error=0.05` (minutes): one linear expert could have all digits,
and competing experts often leave it so: 1.7 are in use by 1.3, 1.4 by 1.2 and
3.0 by 1.1, whose choices then say the most.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import timing
from experiments.origins_1991 import jacobs_figures
from experiments.origins_1991.jacobs_claims import (
  CLAIMS,
  COLUMNS,
  LOSSES,
  SYSTEMS,
)
from experiments.origins_1991.jacobs_measures import measured
from experiments.origins_1991.jacobs_problems import (
  ERROR,
  TARGETS,
  Problem,
  problem,
)
from experiments.origins_1991.jacobs_rows import Found, remarks, rows
from experiments.origins_1991.jacobs_runs import Runs, best_rate, path, train
from experiments.study import results
from experiments.study.study import Claim, Column, Figure, Preset
from experiments.study.tasks import Task
from moe_jax import command_line
from moe_jax.data import ClassRows, open_classes
from moe_jax.data.tasks.class_rows import digest_of
from moe_jax.runs.workdir import write_text

NAME = 'jacobs_table1'
# Seeds that rates are chosen with are none of those that are reported.
EXPLORED = range(1000, 1005)
_DEFAULTS = dict(
  seeds=25, max_epochs=8000, data='vowels', targets=None, error=0.0
)


def run(task: Problem, seeds: int, most: int) -> dict[str, Found]:
  """Explores rates, then runs every system at its best and a shared one."""
  configs = {name: task.config(**made) for name, made in SYSTEMS.items()}
  # A system keeps one core busy, hardly more: its arrays are small.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

    def of_each(function):
      return dict(zip(SYSTEMS, pool.map(function, SYSTEMS), strict=True))

    def sweep(name: str) -> Runs:
      runs = train(
        configs[name], task, task.rates, EXPLORED, most, patience=len(EXPLORED)
      )
      rate = best_rate(task.rates, [runs])
      print(f'{name}: learns best at a rate of {rate:g}', flush=True)
      return runs

    sweeps = of_each(sweep)
    shared = best_rate(task.rates, list(sweeps.values()))

    def final(name: str) -> Found:
      rates = best_rate(task.rates, [sweeps[name]]), shared
      each = sorted(set(rates))
      runs = train(configs[name], task, each, range(seeds), most)
      runs = jax.tree.map(
        lambda leaf: leaf[np.array([*map(each.index, rates)])], runs
      )
      measures = [
        measured(configs[name], task, runs.at(i)) for i in range(len(rates))
      ]
      own, others = (f'{row.mean():,.0f}' for row in runs.epochs)
      print(
        f'{name}: {own} epochs at its own rate of {rates[0]:g}, {others} at '
        f'the {shared:g} of all',
        flush=True,
      )
      return Found(sweeps[name], rates, runs, measures)

    return of_each(final)


@dataclasses.dataclass(frozen=True)
class Table:
  """What `study.results` asks a study for."""

  remarks: str
  name: str = NAME
  title: str = 'Competing experts against back-propagation'
  source: str = 'Jacobs et al. 1991, Table 1'
  columns: Sequence[Column] = COLUMNS
  claims: Sequence[Claim] = CLAIMS
  figure: Figure = Figure(['epochs', 'I(expert; case)', 'experts in use'])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog=f'python -m experiments.{NAME}', description=Table.title
  )
  add = parser.add_argument
  add('--seeds', type=int, default=_DEFAULTS['seeds'], help='runs of a system')
  most = _DEFAULTS['max_epochs']
  add('--max-epochs', type=int, default=most, help='when a run is given up')
  add(
    '--data',
    default=_DEFAULTS['data'],
    help="a source of classes: 'files:<path>' of Peterson and Barney, 'digits'",
  )
  targets = "by default 'pairs' of four classes"
  add('--targets', choices=list(TARGETS), help=targets)
  error = "where a run may stop; 0: the targets' own"
  add('--error', type=float, default=_DEFAULTS['error'], help=error)
  add('--animation', action='store_true', help='writes boundaries.gif too')
  add('--output', default='results', help='where results go')
  options = parser.parse_args(argv)
  for name in ('seeds', 'max_epochs'):
    if getattr(options, name) < 1:
      typed = name.replace('_', '-')
      parser.error(f'--{typed}={getattr(options, name)} is below 1')
  if options.error < 0:
    parser.error(f'--error={options.error} is negative')
  return options


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Runs all, writes table, figures and verdicts; their folder."""
  options = parse(argv)
  try:
    source = open_classes(options.data)
    targets = options.targets or (
      'pairs' if len(source.classes) == 4 else 'one_hot'
    )
    task = problem(source, targets, options.error)
  except ValueError as error:
    command_line.fail(str(error))
  began = time.process_time()
  found = run(task, options.seeds, options.max_epochs)
  splits = {name: ClassRows(source, name) for name in ('train', 'validation')}
  facts = {**timing.facts(), 'minutes': (time.process_time() - began) / 60}
  digest = {'data_digest': digest_of(splits), 'made': facts}
  summary = results.found(
    table := Table(
      remarks(task, found, options.max_epochs),
      claims=claims_of(options, targets),
    ),
    Preset(options.max_epochs, options.seeds),
    Task({}, f'{source.name}, {task.says}, until an error of {task.error:g}'),
    rows(found),
    {'all': [digest]},
    {},
  )
  summary['arguments'] = [f'--{k}={v}' for k, v in _changed(options).items()]
  summary['length'] = f'at most {options.max_epochs:,} epochs'
  folder = pathlib.Path(options.output) / NAME / _label(options)
  text = results.write(folder, table, summary, {})
  sweeps = _sweeps(task, found)
  write_text(folder / 'sweep.json', json.dumps(sweeps, indent=1) + '\n')
  _draw(folder, task, found, summary, options.animation)
  print(f'\n{text}\nwritten: {folder}')
  return folder


def claims_of(options: argparse.Namespace, targets: str) -> list[Claim]:
  """The claims; published numbers are held against the paper's task alone."""
  theirs = options.data == 'vowels' or options.data.startswith('files:')
  theirs &= not options.data.endswith('.npz')
  if targets == 'pairs' and theirs and options.error in (0.0, ERROR):
    return list(CLAIMS)
  return [dataclasses.replace(claim, published=()) for claim in CLAIMS]


def _label(options: argparse.Namespace) -> str:
  """'full', or what differs from it."""
  label = 'full'
  for name, value in _changed(options).items():
    short = pathlib.Path(value).name if name == 'data' else value
    label += f'-{name}={short}'
  return label


def _changed(options: argparse.Namespace) -> dict[str, Any]:
  """The options that say another thing than by default, as they are typed."""
  return {
    name.replace('_', '-'): value
    for name in _DEFAULTS
    if (value := getattr(options, name)) != _DEFAULTS[name]
  }


def _sweeps(task: Problem, found: Mapping[str, Found]) -> dict[str, Any]:
  """By system and rate: mean epochs, and the share of runs that arrived.

  A rate is given up where another is long done: none may have arrived later.
  """
  return {
    name: {
      f'{rate:g}': {
        'epochs': float(of.sweep.epochs[i].mean()),
        'reached': float(of.sweep.reached[i].mean()),
      }
      for i, rate in enumerate(task.rates)
    }
    for name, of in found.items()
  }


def lives(
  task: Problem, found: Mapping[str, Found], count: int = 30
) -> dict[str, jacobs_figures.Life]:
  """Seed 0 of 4 experts with each loss, in so many steps to where it stopped.

  For `jacobs_figures.boundaries` and `jacobs_figures.animation`.
  """
  made = {}
  for loss in LOSSES:
    of = found[f'4 experts, {loss}']
    config = task.config(**SYSTEMS[f'4 experts, {loss}'])
    every = max(1, int(of.runs.epochs[0, 0]) // count)
    params = path(config, task, of.rates[0], 0, every=every, count=count)
    made[loss] = jacobs_figures.Life(config, params, every)
  return made


def _draw(folder, task, found, summary, animated: bool) -> None:
  """The table's figure; where cases have two features, their plane too."""
  sweeps = _sweeps(task, found)
  jacobs_figures.epochs(summary, sweeps, folder / results.PICTURE)
  if task.train.features.shape[-1] != 2:
    return
  made = lives(task, found)
  figure = jacobs_figures.boundaries(task, made)
  figure.savefig(folder / 'boundaries.png', dpi=110)
  if animated:
    moving = jacobs_figures.animation(task, made)
    moving.save(folder / 'boundaries.gif', writer='pillow', dpi=70)


if __name__ == '__main__':
  main()

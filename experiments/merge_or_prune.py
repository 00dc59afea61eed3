"""Merging against pruning of experts, and what to compare experts by.

    python -m experiments.merge_or_prune --preset=quick

M-SMoE (https://arxiv.org/abs/2310.01334) merges the experts whose router logits
on data are alike, HC-SMoE (https://arxiv.org/abs/2410.08589) those whose mean
outputs are, and finds outputs best; second-hand, weights are a little worse and
router logits worst by far. REAP (https://arxiv.org/abs/2510.13999) finds that
pruning, by the mean of gate times norm of output, beats merging, which loses
the mixing by input, for models that generate. All of them are large language
models, and scores are of their tasks.

Here: a decoder of bytes with top-2 of 16 experts in each of four layers, whose
gates sum to one. Each arm is the same trained run with half or a quarter of its
experts, the same number in each layer, without any training afterwards, paired
by seed. Three more arms are trained on for a tenth of the steps of the whole
run: the whole run itself, and a pruned one, on the data alone and with the
whole one as its teacher. Merging keeps the routers, whose columns lead to the
merged experts; pruning makes them as small as the experts, and gates are
renormalised. Merging by router compares the weights of its columns, no logits,
so that it stands for neither paper. Statistics are from batches of the training
split.

Found: to take away half of the experts costs 0.70 nats a byte by outputs and
0.69 by REAP, three quarters 1.24 and 1.42, all without training; after a tenth
of the steps a quarter of the experts is 0.18 behind, with the whole model as
its teacher 0.16.

The full preset's first 5 seeds took 46 core minutes and left ten claims open;
four more seeds were then added, on 2026-11-30, to be run with the others anew.
The runs of all nine took 69 core minutes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.starts import Start
from experiments.study.study import Study
from moe_jax.compression import fewer, merge, whole_run
from moe_jax.compression.whole_run import bytes_in_memory

TRAINED = 'trained'
EXPERTS = 16
# The number of experts that stay, by the share that is removed in per cent.
LEFT = {50: 8, 75: 4}
# Similarity and rule of grouping, by the name of the method of merging.
MERGES = {
  'merge by outputs': ('outputs', 'clusters'),
  'merge by weights': ('weights', 'clusters'),
  'merge by router': ('router', 'clusters'),
  'merge by router, cores': ('router', 'cores'),
}
PRUNES = {
  'prune by usage': 'usage',
  'prune by gate': 'gate',
  'prune by REAP': 'reap',
}
ADDED = Column('added loss', unit='nats/byte')
BYTES = parts.percent('bytes', 'bytes', bounds=parts.ANY)
UNUSED = Column('unused', 'unused', 'experts', 1)
BATCHES = 16  # number of training batches on which experts are measured
PRUNED = 'pruned'  # the start of runs that are trained on
METHOD, REMOVED = 'prune by REAP', 75  # the pruning that makes that start
LONGER = f'{TRAINED}, trained on'
ALONE = f'{METHOD}, {REMOVED} %, trained on'
TAUGHT = f'{METHOD}, {REMOVED} %, distilled'


def config(steps: int):
  """The config of training."""
  config = byte_models.decoder(
    steps, num_experts=EXPERTS, num_selected=2, width=64
  )
  moe = config.model.moe
  moe.expert.hidden = 128
  moe.router.token_choice.gates = 'renormalized'
  byte_models.drop_nothing(moe)
  return config


def merged(
  run: pathlib.Path,
  new: pathlib.Path,
  *,
  left: int,
  batches: int,
  group_by: str,
  rule: str,
) -> Mapping[str, float]:
  """Merges the experts of a run, as a change of an arm.

  Args:
    run: The folder of the run.
    new: The folder of the new one.
    left: The number of experts that stay in each layer.
    batches: The number of batches on which experts are measured.
    group_by: Name of the quantity by which experts are compared.
    rule: The rule of grouping.
  """
  before = fewer.calibrated(whole_run.read(run), batches)
  counts = fewer.numbers(str(left), before.layers)
  layers = merge.merge(before, counts, group_by=group_by, rule=rule)
  return _written(before, layers, new)


def pruned(
  run: pathlib.Path,
  new: pathlib.Path,
  *,
  left: int,
  batches: int,
  score: str,
) -> Mapping[str, float]:
  """Prunes the experts of a run by a score; see `merged`."""
  before = fewer.calibrated(whole_run.read(run), batches)
  counts = fewer.numbers(str(left), before.layers)
  layers = fewer.prune(before, counts, score=score)
  return _written(before, layers, new)


def _written(
  before: fewer.Calibrated,
  layers: Mapping[int, fewer.SmallerLayer],
  new: pathlib.Path,
) -> Mapping[str, float]:
  options, variables = fewer.smaller(before.run, layers)
  params = variables['params']
  state = variables.get('router_state')
  whole_run.write(before.run, new, params, options, router_state=state)
  old = bytes_in_memory(before.run.variables['params'])
  return {
    'bytes': bytes_in_memory(params) / old,
    'unused': sum(len(usage.unused) for usage in before.usage.values()),
  }


def row_name(method: str, removed: int) -> str:
  """The name of the row of a method with a share removed, in per cent."""
  return f'{method}, {removed} %'


def starts(_: Preset) -> list[Start]:
  """The run that all arms make smaller, and one that is trained on."""
  change = functools.partial(
    pruned, left=LEFT[REMOVED], batches=BATCHES, score=PRUNES[METHOD]
  )
  return [
    Start(TRAINED),
    Start(PRUNED, start=TRAINED, change=change),
  ]


def trained_on(preset: Preset) -> list[Arm]:
  """The arms that go on from the whole run, and from a pruned one."""
  steps = max(preset.steps // 10, 1)
  shared = {
    'total_steps': steps,
    'log_every_steps': steps,
    'optimizer.schedule.warmup_steps': steps // 10,
  }
  small = shared | {'model.moe.num_experts': LEFT[REMOVED]}
  taught = small | {'distill.start': 'none'}
  return [
    Arm(LONGER, shared, start=TRAINED),
    Arm(ALONE, small, start=PRUNED),
    Arm(TAUGHT, taught, start=PRUNED, teacher=TRAINED),
  ]


def arms(preset: Preset) -> list[Arm]:
  """An arm for each method and number of experts, and arms trained on."""
  changes = {
    method: functools.partial(merged, group_by=group_by, rule=rule)
    for method, (group_by, rule) in MERGES.items()
  } | {
    method: functools.partial(pruned, score=score)
    for method, score in PRUNES.items()
  }
  return [
    Arm(
      row_name(method, removed),
      {},
      line=method,
      x=removed,
      start=TRAINED,
      change=functools.partial(change, left=num_left, batches=BATCHES),
    )
    for method, change in changes.items()
    for removed, num_left in LEFT.items()
  ] + trained_on(preset)


def rows(results: parts.Results) -> list[Row]:
  """The trained run, each method that makes it smaller, and runs trained on.

  The loss that a run that is trained on adds is compared with the whole run of
  as many steps.
  """
  loss = byte_models.LOSS
  whole = [*map(loss.of, results[TRAINED])]
  longer = [*map(loss.of, results[LONGER])]
  small = [*map(BYTES.of, results[PRUNED])]
  all_bytes = [100.0] * len(whole)

  def row(name: str, base: list[float], sizes: list[float], *point) -> Row:
    values = parts.row_of(name, results[name], [loss, UNUSED]).values
    pairs = zip(values[loss.name], base, strict=True)
    added = [after - before for after, before in pairs]
    more = {ADDED.name: added, BYTES.name: sizes}
    return Row(name, {**values, **more}, *point)

  smaller = [
    row(name, whole, [*map(BYTES.of, results[name])], method, removed)
    for method in (*MERGES, *PRUNES)
    for removed in LEFT
    for name in [row_name(method, removed)]
  ]
  return [
    row(TRAINED, whole, all_bytes),
    *smaller,
    row(LONGER, longer, all_bytes),
    row(ALONE, longer, small),
    row(TAUGHT, longer, small),
  ]


def compared(method: str, than: str, removed: int) -> str:
  """A claim's comparison: one method has a lower loss than another."""
  return f'loss: {row_name(method, removed)} < {row_name(than, removed)}'


def by_similarity(better: str, worse: str, removed: int) -> Claim:
  """A claim that one similarity of experts merges better than another.

  No paper has a number for columns of the router.
  """
  published, note = [], ''
  if worse != 'router':
    published = [f'hcsmoe2024/similarity/{n}/score' for n in (better, worse)]
    note = 'The papers remove a quarter, and have scores of tasks.'
  return Claim(
    f'merging by {better} is better than by {worse}, {removed} % removed',
    compared(f'merge by {better}', f'merge by {worse}', removed),
    published,
    note,
  )


_OPEN = 'Not resolved with five seeds'
# Results of five seeds, by the words of claims whose verdict nine have changed.
_BEFORE = {
  'merging by outputs is better than by router, 75 % removed': (
    f'{_OPEN} (0.010 ± 0.107)'
  ),
  'REAP prunes better than merging by outputs, 75 % removed': (
    f'{_OPEN} (0.059 ± 0.112)'
  ),
  'REAP prunes better than usage does, 75 % removed': (
    'Shown with five seeds (-0.124 ± 0.115)'
  ),
  'REAP prunes better than gate does, 50 % removed': (
    f'{_OPEN} (-0.006 ± 0.034)'
  ),
  'REAP prunes better than gate does, 75 % removed': (
    f'{_OPEN} (-0.091 ± 0.137)'
  ),
}


def with_change(claim: Claim) -> Claim:
  """The claim, which says so where more seeds have changed its verdict."""
  if claim.text not in _BEFORE:
    return claim
  change = parts.more_seeds(_BEFORE[claim.text], 'nine', '2026-11-30')
  return dataclasses.replace(claim, changes=[change])


def claims() -> list[Claim]:
  """Outputs are the best similarity, and pruning beats merging."""
  paper_claims = [
    by_similarity(better, worse, removed)
    for better, worse in (
      ('outputs', 'weights'),
      ('outputs', 'router'),
      ('weights', 'router'),
    )
    for removed in LEFT
  ]
  paper_claims += [
    Claim(
      f'REAP prunes better than merging by outputs, {removed} % removed',
      compared('prune by REAP', 'merge by outputs', removed),
      note='The paper says so of models that generate.',
    )
    for removed in LEFT
  ]
  return (
    paper_claims
    + [
      Claim(
        f'REAP prunes better than {score} does, {removed} % removed',
        compared('prune by REAP', f'prune by {score}', removed),
      )
      for score in ('usage', 'gate')
      for removed in LEFT
    ]
    + [
      Claim(
        'a pruned model that is trained on is better than before',
        f'loss: {ALONE} < {row_name(METHOD, REMOVED)}',
      ),
      Claim(
        'a pruned model recovers better with the whole one as its teacher',
        f'loss: {TAUGHT} < {ALONE}',
      ),
    ]
  )


STUDY = Study(
  name='merge_or_prune',
  title='Merging against pruning of experts',
  source='HC-SMoE, M-SMoE and REAP',
  config=config,
  arms=arms,
  rows=rows,
  starts=starts,
  presets={'quick': Preset(400, 3), 'full': Preset(2000, 9)},
  columns=[byte_models.LOSS, ADDED, BYTES, UNUSED],
  claims=[with_change(claim) for claim in claims()],
  written='2026-11-27',
  figure=Figure(['added loss'], 'experts removed, %'),
  length=lambda preset: (
    f'{preset.steps:,} steps, then merged or pruned, or trained on for '
    f'{max(preset.steps // 10, 1):,}'
  ),
  remarks=(
    'Runs that are trained on read the first batches of training again, at '
    'the full learning rate; what they add is compared with the whole run '
    'that is trained on as well.'
  ),
)
get_config = STUDY.get_config

if __name__ == '__main__':
  command.main(STUDY)

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

The full preset's first 5 seeds took 46 core minutes and left ten claims open;
four more seeds were then added, on 2026-11-30, to be run with the others anew.
As the first results were known, these four alone judge. The runs of all nine
took 69 core minutes.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.study import byte_models, command, finetuned, parts, rates
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
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
ADDED = Column('added loss', unit='nats/byte')
BYTES = parts.percent('bytes', 'bytes', bounds=parts.ANY)
UNUSED = Column('unused', 'unused', 'experts', 1)
BATCHES = 16  # number of training batches on which experts are measured
PRUNED = 'pruned'  # the start of runs that are trained on
LONGER = 'trained, trained on'
ALONE = 'prune by REAP, 75 %, trained on'
TAUGHT = 'prune by REAP, 75 %, distilled'


def config(steps: int):
  """The config of training."""
  sizes = dict(num_layers=4, num_experts=EXPERTS, num_selected=2)
  config = byte_models.decoder(steps, **sizes, expert_hidden=128, drops=False)
  config.model.moe.router.token_choice.gates = 'renormalized'
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
  method = functools.partial(merge.merge, group_by=group_by, rule=rule)
  return _smaller(run, new, left, batches, method)


def pruned(
  run: pathlib.Path, new: pathlib.Path, *, left: int, batches: int, score: str
) -> Mapping[str, float]:
  """Prunes the experts of a run by a score; see `merged`."""
  method = functools.partial(fewer.prune, score=score)
  return _smaller(run, new, left, batches, method)


def _smaller(run, new, left, batches, method) -> dict[str, float]:
  """Writes the run with smaller layers, which `method` makes of its layers.

  Args:
    run: The folder of the run.
    new: The folder of the new one.
    left: The number of experts that stay in each layer.
    batches: The number of batches on which experts are measured.
    method: Function of the measured run and of the number of experts that stay
      in each layer; it returns the smaller layers.

  Returns:
    bytes, of the new parameters as a share of the old ones; unused, the number
    of experts that no token of the batches chose.
  """
  before = fewer.calibrated(whole_run.read(run), batches)
  layers = method(before, fewer.numbers(str(left), before.layers))
  options, variables = fewer.smaller(before.run, layers)
  params = variables['params']
  state = variables.get('router_state')
  whole_run.write(before.run, new, params, options, router_state=state)
  old = bytes_in_memory(before.run.variables['params'])
  return {
    'bytes': bytes_in_memory(params) / old,
    'unused': sum(len(usage.unused) for usage in before.usage.values()),
  }


def starts(_: Preset) -> list[parts.Start]:
  """The run that all arms make smaller, and one that is trained on."""
  how = functools.partial(pruned, left=LEFT[75], batches=BATCHES, score='reap')
  return [parts.Start(TRAINED), parts.Start(PRUNED, start=TRAINED, change=how)]


def trained_on(preset: Preset) -> list[Arm]:
  """The arms that go on from the whole run, and from a pruned one."""
  steps = max(preset.steps // 10, 1)
  shared = finetuned.length(steps, log_every=steps)
  small = shared | {'model.moe.num_experts': LEFT[75]}
  taught = small | {'distill.start': 'none'}
  return [
    Arm(LONGER, shared, start=TRAINED),
    Arm(ALONE, small, start=PRUNED),
    Arm(TAUGHT, taught, start=PRUNED, teacher=TRAINED),
  ]


def made_smaller() -> list[Arm]:
  """An arm for each method and number of experts."""
  changes = {
    method: functools.partial(merged, group_by=group_by, rule=rule)
    for method, (group_by, rule) in MERGES.items()
  } | {
    f'prune by {score}': functools.partial(pruned, score=score.lower())
    for score in ('usage', 'gate', 'REAP')
  }
  all_arms = []
  for method, change in changes.items():
    for removed, left in LEFT.items():
      how = functools.partial(change, left=left, batches=BATCHES)
      place = dict(line=method, x=removed)
      name = f'{method}, {removed} %'
      all_arms.append(Arm(name, {}, **place, start=TRAINED, change=how))
  return all_arms


def rows(results: parts.Results) -> list[Row]:
  """The trained run, each method that makes it smaller, and runs trained on.

  The loss that a run that is trained on adds is compared with the whole run of
  as many steps.
  """
  loss = byte_models.LOSS
  whole, longer = ([*map(loss.of, results[n])] for n in (TRAINED, LONGER))
  all_bytes = [100.0] * len(whole)

  def row(arm: Arm, base: list[float], sizes: list[float]) -> Row:
    runs = results[arm.name]
    row = parts.row_of(arm.name, runs, [loss, UNUSED], arm.line, arm.x)
    added = np.subtract(row.values[loss.name], base).tolist()
    return row.plus({ADDED.name: added, BYTES.name: sizes})

  small = [*map(BYTES.of, results[PRUNED])]
  return [
    row(Arm(TRAINED, {}), whole, all_bytes),
    *(
      row(arm, whole, [*map(BYTES.of, results[arm.name])])
      for arm in made_smaller()
    ),
    row(Arm(LONGER, {}), longer, all_bytes),
    row(Arm(ALONE, {}), longer, small),
    row(Arm(TAUGHT, {}), longer, small),
  ]


_OPEN = 'Not resolved with five seeds'
# Results of five seeds, by the rows of claims that the others judge otherwise.
_BEFORE = {
  ('prune by REAP', 'merge by outputs', 50): f'{_OPEN} (0.040 ± 0.100)',
  ('prune by REAP', 'merge by outputs', 75): f'{_OPEN} (0.059 ± 0.112)',
  ('prune by REAP', 'prune by usage', 75): (
    'Shown with five seeds (-0.124 ± 0.115)'
  ),
  ('prune by REAP', 'prune by gate', 75): f'{_OPEN} (-0.091 ± 0.137)',
}


def claims(
  text: str,
  method: str,
  than: str,
  published: Sequence[str] = (),
  note: str = '',
) -> parts.Claims:
  """Claims that one method has a lower loss than another, at both shares.

  A claim says so where the seeds that were added have changed its verdict.
  """
  changes = {
    removed: [parts.more_seeds(before, '2026-11-30')]
    for (*names, removed), before in _BEFORE.items()
    if names == [method, than]
  }
  return {
    f'{text}, {removed} % removed': Claim(
      f'loss: {method}, {removed} % < {than}, {removed} %',
      published,
      note,
      changes.get(removed, ()),
    )
    for removed in LEFT
  }


def by_similarity(better: str, worse: str) -> parts.Claims:
  """Claims that one similarity of experts merges better than another.

  No paper has a number for columns of the router.
  """
  cells, note = [], ''
  if worse != 'router':
    cells = [f'hcsmoe2024/similarity/{n}/score' for n in (better, worse)]
    note = 'The papers remove a quarter, and have scores of tasks.'
  text = f'merging by {better} is better than by {worse}'
  return claims(text, f'merge by {better}', f'merge by {worse}', cells, note)


CLAIMS = {
  **by_similarity('outputs', 'weights'),
  **by_similarity('outputs', 'router'),
  **by_similarity('weights', 'router'),
  **claims(
    'REAP prunes better than merging by outputs',
    'prune by REAP',
    'merge by outputs',
    note='The paper says so of models that generate.',
  ),
  **claims(
    'REAP prunes better than usage does', 'prune by REAP', 'prune by usage'
  ),
  **claims(
    'REAP prunes better than gate does', 'prune by REAP', 'prune by gate'
  ),
  'a pruned model that is trained on is better than before': (
    f'loss: {ALONE} < prune by REAP, 75 %'
  ),
  'a pruned model recovers better with the whole one as its teacher': (
    f'loss: {TAUGHT} < {ALONE}'
  ),
}
STUDY = Study(
  name='merge_or_prune',
  title='Merging against pruning of experts',
  source='HC-SMoE, M-SMoE and REAP',
  config=config,
  arms=lambda preset: [*made_smaller(), *trained_on(preset)],
  rows=rows,
  starts=starts,
  presets={'quick': Preset(400, 3), 'full': Preset(2000, 9, seeds_seen=5)},
  columns=[byte_models.LOSS, ADDED, BYTES, UNUSED],
  claims=CLAIMS,
  written='2026-11-27',
  earlier=[
    'Until 2026-12-01 all nine seeds judged the claims. With 75 % removed, '
    'merging by outputs was then shown to be better than by router (-0.0384 ± '
    '0.0293); with 50 % removed, REAP was shown to be better than gate '
    '(-0.0985 ± 0.0518), and REAP against merging by outputs was not resolved '
    '(-0.0066 ± 0.0434).'
  ],
  exempt=rates.UNTRAINED,
  figure=Figure(['added loss'], 'experts removed, %'),
  length=lambda preset: (
    f'{preset.steps:,} steps, then merged or pruned, or trained on for '
    f'{max(preset.steps // 10, 1):,}'
  ),
  remarks='Runs that are trained on read the first batches of training again, '
  'at the full learning rate; what they add is compared with the whole run '
  'that is trained on as well.',
)
get_config, get_items = command.entries(STUDY, __name__)

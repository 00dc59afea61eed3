"""Merging against pruning of experts, and what to compare experts by.

    python -m experiments.merge_or_prune --preset=quick

M-SMoE (https://arxiv.org/abs/2310.01334) merges experts into the most used ones
by their router logits on data, HC-SMoE (https://arxiv.org/abs/2410.08589) those
whose mean outputs are alike, and finds outputs best where a quarter is removed;
second-hand, weights are a little worse and router logits worst by far. REAP
(https://arxiv.org/abs/2510.13999) finds that pruning, by the mean of gate times
norm of output, beats merging, which loses the mixing by input, for models that
generate. All of them are large language models, and scores are of their tasks.

Here: decoders of bytes of two layers, both with top-2 of 16 experts whose gates
sum to one, trained on one text in eight ciphers, where a sparse model is better
than its dense twin (`switch_table6`). Each trained model loses a quarter, half
or three quarters of its experts in each layer, without training afterwards.
Merging keeps the router, whose columns lead to the merged experts; pruning
makes it as small as the experts, and gates are renormalised. Router logits are
compared as vectors of length 1, by their distance: pairs are in the order of
their cosines, but means over a group, which clusters are made by, are not.
Unlike in M-SMoE, all layers keep as many experts.

All methods are deterministic; what is random are the batches on which experts
are measured. Each model is made smaller by three sets of 16 batches, which it
would have read next; their losses are averaged, and their deviation is printed.
Controls at random have groups of the sizes that outputs give, or keep experts
by the gates of others, drawn anew for each set. Where REAP is not seen to beat
chance, methods are not compared. By the spread of earlier runs, with half
removed, 12 seeds resolve 0.05 nats a byte between outputs and weights, and 0.04
between REAP and outputs.

The quick preset decides nothing. The full preset, 2 arms, 12 seeds and 800
steps, and 16 trials of 240, took 45 of its planned 57 core minutes. The claims
were written anew, before any run of them, when task and size were changed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from experiments.study import byte_models, command, parts, rates, routing
from experiments.study.parts import Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import TASKS
from moe_jax.compression import calibration, fewer, merge
from moe_jax.compression.fewer import Calibrated, SmallerLayer
from moe_jax.models import Model
from moe_jax.models.expert_arrays import assembled, sparse_layers
from moe_jax.training.evaluate import Variables
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState
from moe_jax.training.trained import Loaded

TRAINED, DENSE = 'trained', 'dense'
EXPERTS = 16
# The number of experts that stay, by the share that is removed in per cent.
LEFT = {25: 12, 50: 8, 75: 4}
CALIBRATIONS, BATCHES = 3, 16  # sets of batches, and the size of each
OUTPUTS, REAP = 'merging by outputs', 'pruning by REAP'
BY_CHANCE = 'pruning at random'
# What the mean outputs of experts are replaced by; see `compared_by`.
LOGITS, RANDOM = 'logits', 'random'
# What experts are compared by, if not by their own statistics, and the function
# that makes layers smaller, by the name of the method.
METHODS: Mapping[str, tuple[str, Callable[..., dict[int, SmallerLayer]]]] = {
  OUTPUTS: ('', merge.merge),
  'merging by weights': (
    '',
    functools.partial(merge.merge, group_by='weights'),
  ),
  'merging by logits': (LOGITS, merge.merge),
  'merging by logits, cores': (
    LOGITS,
    functools.partial(merge.merge, rule='cores'),
  ),
  'merging at random': (RANDOM, merge.merge),
  'pruning by usage': ('', functools.partial(fewer.prune, score='usage')),
  'pruning by gate': ('', functools.partial(fewer.prune, score='gate')),
  REAP: ('', fewer.prune),
  BY_CHANCE: (RANDOM, functools.partial(fewer.prune, score='gate')),
}
ADDED = Column('added loss', 'routing/*/added', 'nats/byte')
SPREAD = Column('spread', 'routing/*/spread', 'nats/byte')


def config(steps: int):
  """The config of training."""
  sizes = dict(num_experts=EXPERTS, num_selected=2, expert_hidden=128)
  config = byte_models.decoder(steps, **sizes, drops=False)
  config.model.moe.router.token_choice.gates = 'renormalized'
  return config


# Method and share removed in per cent, by the name of the row of both.
SMALLER = {
  f'{method}, {removed} %': (method, removed)
  for method in METHODS
  for removed in LEFT
}


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """What fewer experts cost a trained run, over several calibrations.

  Dense runs have no experts, and trials of rates judge nothing.

  Returns:
    `routing/<row>/added`, the mean loss over that of the whole run, and
    `routing/<row>/spread`, its standard deviation over calibrations.
  """
  seed, step = run.options.seed, int(state.step)
  if not run.options.model.moe.num_experts or seed in rates.SEEDS:
    return {}
  variables = run.programs.variables(state)
  whole = Loaded(run.workdir, run.options, run.model, variables, step)
  evaluation, unread = routing.evaluation_of(run), run.batches(step)
  added: dict[str, list[float]] = {name: [] for name in SMALLER}
  loss = evaluation(variables, step)['loss']
  for number in range(CALIBRATIONS):
    batches = [*itertools.islice(unread, BATCHES)]
    sources = compared_by(whole, batches, np.random.default_rng([seed, number]))
    for name, (method, removed) in SMALLER.items():
      source, make = METHODS[method]
      counts = dict.fromkeys(sources[source].layers, LEFT[removed])
      model, own = with_layers(whole, make(sources[source], counts))
      measured = dataclasses.replace(evaluation, model=model)
      added[name].append(measured(own, step)['loss'] - loss)
  measures = {
    name: {'added': float(np.mean(x)), 'spread': float(np.std(x, ddof=1))}
    for name, x in added.items()
  }
  return routing.named(measures)


def compared_by(
  whole: Loaded, batches: Sequence[Mapping], rng: np.random.Generator
) -> dict[str, Calibrated]:
  """The run with statistics of its experts, and with others in their place.

  Returns:
    Its own by ''; by `LOGITS` with router logits on all tokens, of norm 1, in
    place of mean outputs; and by `RANDOM` with outputs and gates shuffled.
  """
  model, variables = whole.model, whole.variables
  own = calibration.measure(model, variables, batches)
  chosen = [
    routing.choices(model, variables, batch, {}, train=False, logits=True)
    for batch in batches
  ]
  logits, shuffled = {}, {}
  for n, usage in own.items():
    of_tokens = np.concatenate(
      [np.asarray(choices[n].logits).reshape(-1, EXPERTS) for choices in chosen]
    )
    of_tokens = of_tokens / np.linalg.norm(of_tokens, axis=0)
    logits[n] = usage._replace(output=of_tokens.T)
    order = rng.permutation(EXPERTS)
    mixed = dict(output=usage.output[order], gate=usage.gate[order])
    shuffled[n] = usage._replace(**mixed)
  layers = sparse_layers(model, variables)
  return {
    name: Calibrated(whole, layers, usage)
    for name, usage in {'': own, LOGITS: logits, RANDOM: shuffled}.items()
  }


def with_layers(
  whole: Loaded, layers: Mapping[int, SmallerLayer]
) -> tuple[Model, Variables]:
  """The model with smaller layers, and its variables.

  A merged expert stands in the whole model, in the place of each expert of its
  group, which computes the same, so that nothing is compiled anew.
  """
  if all(len(new.row) == EXPERTS for new in layers.values()):
    copies = {
      n: {path: x[np.array(new.row)] for path, x in new.arrays.items()}
      for n, new in layers.items()
    }
    model = whole.model
    return model, assembled(model, whole.variables, model, copies)
  options, variables = fewer.smaller(whole, layers)
  return options.build(whole.options.sharding.rules), variables


def rows(results: parts.Results) -> list[Row]:
  """The dense twin, the trained run, and it with fewer experts."""
  runs, loss = results[TRAINED], [byte_models.LOSS]
  table = [parts.row_of(name, results[name], loss) for name in (DENSE, TRAINED)]
  for name, (method, removed) in SMALLER.items():
    row = routing.row_at(name, runs, [ADDED, SPREAD], name)
    table.append(dataclasses.replace(row, line=method, x=removed))
  return table


# What HC-SMoE compares experts by where it has a score, by method; it removes a
# quarter.
SIMILARITIES = {
  OUTPUTS: 'outputs',
  'merging by weights': 'weights',
  'merging by logits': 'router logits',
}


def claims(
  better: str, worse: str, note: str = '', shares: Sequence[int] = (25, 50)
) -> parts.Claims:
  """Claims that one method costs less than another, by share removed in %."""
  cells = []
  if {better, worse} <= SIMILARITIES.keys():
    names = SIMILARITIES[better], SIMILARITIES[worse]
    cells = [f'hcsmoe2024/similarity/{name}/score' for name in names]
  return {
    f'{better} is better than {worse}, {n} % removed': Claim(
      f'{ADDED.name}: {better}, {n} % < {worse}, {n} %',
      cells if n == 25 else (),
      note,
    )
    for n in shares
  }


SCORES = 'HC-SMoE has scores of tasks.'
CORES = 'HC-SMoE says so of M-SMoE, whose rule of grouping is another one, too.'
CLAIMS = {
  **claims(OUTPUTS, 'merging by weights', SCORES),
  **claims(OUTPUTS, 'merging by logits', SCORES),
  **claims(OUTPUTS, 'merging by logits, cores', CORES),
  **claims(OUTPUTS, 'merging at random'),
  **claims(
    REAP, OUTPUTS, 'REAP says so of models that generate.', (25, 50, 75)
  ),
  **claims(REAP, 'pruning by usage'),
  **claims(REAP, 'pruning by gate'),
  **claims('pruning by usage', BY_CHANCE),
}
STUDY = Study(
  name='merge_or_prune',
  title='Merging against pruning of experts',
  source='HC-SMoE, M-SMoE and REAP',
  config=config,
  arms=lambda _: [byte_models.dense(DENSE), parts.Arm(TRAINED, {})],
  rows=rows,
  presets={'quick': parts.trial(100, 3), 'full': Preset(800, 12)},
  columns=[byte_models.LOSS, ADDED, SPREAD],
  claims=CLAIMS,
  measure=measure,
  gates={
    f'loss: {TRAINED} < {DENSE}': ['*'],
    **{
      f'{ADDED.name}: {REAP}, {n} % < {BY_CHANCE}, {n} %': [
        f'* than * by *{n} % removed'  # not those on what is at random
      ]
      for n in LEFT
    },
  },
  rates=(0.002, 0.004, 0.008, 0.016),
  # Seven lines have styles of their own, so that two are in the table alone.
  figure=Figure(
    [ADDED.name],
    'experts removed, %',
    without=[DENSE, TRAINED, '* cores*', '* by usage*'],
  ),
  remarks='The added loss is the mean over three calibrations of each model, '
  'and the spread its standard deviation over them.',
  tasks={'cipher': TASKS['cipher'], **TASKS},
  earlier=[
    'Until 2026-12-01 all nine seeds judged the claims. With 75 % removed, '
    'merging by outputs was then shown to be better than by router (-0.0384 ± '
    '0.0293); with 50 % removed, REAP was shown to be better than gate '
    '(-0.0985 ± 0.0518), and REAP against merging by outputs was not resolved '
    '(-0.0066 ± 0.0434).',
    'Until 2026-12-02 models of four layers were trained on plain text, had no '
    'dense twin, and lost half or three quarters by one calibration. REAP was '
    'better than merging by outputs with half removed (-0.0436 ± 0.0318), '
    'worse with three quarters (0.1792 ± 0.1040), better than usage with half '
    '(-0.2062 ± 0.0738) and than gate with three quarters (-0.1252 ± 0.1118); '
    'eight of 13 claims were open. Claims were taken out on columns of the '
    'router, on three quarters removed but for REAP against outputs, and on '
    'runs that were trained on for a tenth of the steps: with a quarter left '
    'by REAP they were 0.1807 ± 0.0079 behind the whole run, and 0.0193 ± '
    '0.0029 less with that as the teacher ("shown").',
  ],
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)

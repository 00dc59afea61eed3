"""Group size against drops, loss and cost, and second experts that are sampled.

    python -m experiments.gshard_groups --preset=quick

GShard (https://arxiv.org/abs/2006.16668) cuts a batch into groups of S tokens,
each of which is dispatched by itself with 2 S / E slots an expert, and sends a
token's second choice with a probability of twice its gate, since one of small
weight may as well be left out. Only its rules are compared, no numbers of its
own. ST-MoE (https://arxiv.org/abs/2202.08906) blames groups of two to four
sequences for experts that do not specialise in languages.

Here: byte-level decoders of four domains, top-2 of 16 experts in each of two
layers, served as in Algorithm 1: first choices before second ones, two slots a
token, a balance loss of first choices in each group, gates that sum to one
before any is dropped. A batch is 16 rows of 128 tokens, each of one domain;
groups are a quarter of a row, a row, four rows (one of each domain) or the
batch. Second choices are sampled, or all sent; as in Algorithm 1 one that is
not sent keeps its place in the queue. In evaluation all are sent. Which second
choices find a slot depends on later tokens, so that all rows with slots may
see a little of their future; losses without drops see none of it. Batches of an
evaluation have one domain each, unlike those of training: models are compared
without drops, and who is served is measured on rows of all domains in turn.

The dispatch of the paper multiplies by one-hot masks, [S, E, C] in each group;
its products, forward, are counted as a multiple of those of the experts. Steps
are timed with it and with gathered rows, which all other numbers are made with:
both dispatch alike. The rows of timed steps are trained for 8 steps alone.

The full preset, 7 arms of 500 steps and 2 of timed steps, 5 seeds, was planned
for 14 minutes on two idle cores; its runs took 32 core minutes. Timing was
planned for 6 minutes more. The quick preset resolves drops, not losses. The
claims were written before any run.
"""

import itertools
from collections.abc import Mapping

from experiments.study import byte_models, command, domains, parts, routing
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.times import StepTime
from moe_jax.analysis import cost
from moe_jax.analysis.recording import header_of
from moe_jax.layers.experts import Einsum
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Tokens of a group by its name in rows; -1 is the whole batch.
GROUPS = {'32': 32, '128': 128, '512': 512, '2048': -1}
TOP2 = 'GShard top-2'
SMALL, ROW, FOUR, BATCH = (f'{TOP2}, groups of {S}' for S in GROUPS)
SMALL_ALL, BATCH_ALL = f'{SMALL}, all sent', f'{BATCH}, all sent'
SERVED = 'evaluated without drops'
MASKS = {S: f'{TOP2}, masks, groups of {S}' for S in ('32', '2048')}
TIMED = [BATCH, SMALL, *MASKS.values()]
DROPPED, SECOND, UNSERVED = 'dropped', 'second served', 'without expert'
DOMAIN, PRODUCTS, TIME = 'domain', 'masks / experts', 'step time / 2048'
SAME = 0.02
ON_CPU = 'Measured on a CPU, whose ratio is not that of an accelerator.'
_NO_DROPS = 'no_drops'
_BATCHES = 10  # number of batches of each domain


def config(steps: int):
  """The config that the arms share, in groups of one row."""
  config = domains.decoder(steps, num_experts=16, expert_hidden=128)
  config.model.moe.group_size = 128
  byte_models.serve_as_gshard(config.model.moe)
  config.evals[_NO_DROPS] = byte_models.no_drops()
  return config


def arms(_: Preset) -> list[Arm]:
  """Groups of four sizes, two of them with all choices sent; timed steps."""
  size = 'model.moe.group_size'
  send_all = {'model.moe.router.token_choice.second_policy': 'all'}
  timed_alone = {
    'model.moe.dispatch.kind': 'einsum',
    'total_steps': 8,
    'log_every_steps': 8,
    'optimizer.schedule.warmup_steps': 1,
    f'evals.{byte_models.EVAL}.num_batches': 1,
    f'evals.{_NO_DROPS}.num_batches': 1,
  }
  return [
    *(Arm(name, {size: GROUPS[S], **timed_alone}) for S, name in MASKS.items()),
    Arm(SMALL_ALL, {size: 32, **send_all}),
    Arm(BATCH_ALL, {size: -1, **send_all}),
    Arm('no drops', {size: -1, **byte_models.DROPLESS}),
    *(Arm(f'{TOP2}, groups of {S}', {size: n}) for S, n in GROUPS.items()),
  ]


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures who is served in training, and how experts specialise.

  Returns:
    Numbers by name, `routing/layer_<i>/<what>`: masks, the products of a
    dispatch by masks as a multiple of the experts'; second, the share of second
    choices that are served; none, the share of tokens without expert; domain,
    information of first choices about their domain as a share of their entropy.
    Of timed steps there is only the first.
  """
  model, width = run.model, run.options.model.width
  counted = cost.count(model, run.options.data.seq_len).decoder
  experts = counted.experts / len(model.stacks.sparse_layers)
  layers, measures = {}, {}
  if not isinstance(model.stacks.moe.dispatch, Einsum):
    layers = routing.last_layers(run, state, _BATCHES, mixed=True)
  domain = routing.fractions(layers, 'domain')
  for number, info in header_of(run).layers.items():
    shares = measures[number] = {}
    if slots := info.capacity:
      shares['masks'] = 4 * info.num_experts * slots * width / experts
    if layer := layers.get(number):
      shares |= domain[number]
      shares['second'] = float(layer.kept[:, 1].mean())
      shares['none'] = float((~layer.kept).all(1).mean())
  return routing.named(measures)


def rows(results: parts.Results, times: Mapping[str, StepTime]) -> list[Row]:
  """A row for each arm, and for three of them as evaluated without drops."""
  table = []
  for name, runs in results.items():
    timed_alone = name in MASKS.values()
    shown = [c for c in COLUMNS if not timed_alone or c.name == PRODUCTS]
    seconds = {TIME: [*times[name].ratios]} if name in times else {}
    table.append(parts.row_of(name, runs, shown).plus(seconds))
    if name in (SMALL, BATCH, BATCH_ALL):
      served = [run[f'eval/{_NO_DROPS}/loss'] for run in runs]
      table.append(Row(f'{name}, {SERVED}', {'loss': served}))
  return table


COLUMNS = [
  byte_models.LOSS,
  parts.percent(DROPPED, 'train/drop_rate'),
  parts.percent(SECOND, 'routing/*/second'),
  parts.percent(UNSERVED, 'routing/*/none'),
  parts.percent(DOMAIN, 'routing/*/domain', bounds=parts.ANY),
  Column(PRODUCTS, 'routing/*/masks', 'x', 2, bounds=parts.POSITIVE),
  Column(TIME, '', 'x', 2, bounds=parts.POSITIVE),
]
STUDY = Study(
  name='gshard_groups',
  title='Groups of tokens that are routed by themselves, large and small',
  source='GShard, Algorithm 1 (directions alone)',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': parts.trial(150, 3, [FOUR, '*all sent']),
    'full': Preset(500, 5, burst_for_each_seed=True),
  },
  columns=COLUMNS,
  claims={
    **{
      f'smaller groups drop more: {small} tokens against {large}': (
        f'dropped: {TOP2}, groups of {small} > {TOP2}, groups of {large}'
      )
      for small, large in itertools.pairwise(GROUPS)
    },
    'small groups cost quality': Claim(
      f'loss: {SMALL}, {SERVED} > {BATCH}, {SERVED}',
      note='Both are evaluated without drops.',
    ),
    'what small groups drop is missed: without drops their model is better': (
      f'loss: {SMALL}, {SERVED} < {SMALL}'
    ),
    'small groups hold experts back from domains of their own': Claim(
      f'{DOMAIN}: {ROW} < {BATCH}',
      note='ST-MoE has groups of two to four sequences, and languages.',
    ),
    'second choices that are sampled are as good as all of them': Claim(
      f'loss: {BATCH}, {SERVED} = {BATCH_ALL}, {SERVED} within {SAME}',
      note='The bound is half of what experts are worth in such models, about '
      '0.04 nats a byte.',
    ),
    'sampling serves fewer': f'{SECOND}: {BATCH} < {BATCH_ALL}',
    'masks take longer in larger groups': Claim(
      f'{TIME}: {MASKS["2048"]} > {MASKS["32"]}', note=ON_CPU
    ),
    'in a group of the batch masks take longer than gathered rows': Claim(
      f'{TIME}: {MASKS["2048"]} > {BATCH}', note=ON_CPU
    ),
  },
  measure=measure,
  timed=TIMED,
  figure=Figure(['loss', DROPPED, SECOND, DOMAIN], without=['*masks*']),
  remarks='All rows with slots may leak: which second choices are served '
  'depends on later tokens. Drops are those of training, where a choice that '
  'is not sent is not dropped. Who is served is measured on validation '
  'batches of all domains; losses with slots are those of batches of one '
  'domain each. Rows of masks are timed; they are trained for 8 steps only. '
  '"Domain" is the information that first choices have about the domain, in '
  'per cent of their entropy.',
  tasks=domains.TASKS,
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
